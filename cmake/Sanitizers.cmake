# SPDX-License-Identifier: Apache-2.0
# DYNAMIC_MOE_SANITIZE: a list for -fsanitize=, e.g. address;undefined. Applies to everything that is built after it.
set(DYNAMIC_MOE_SANITIZE "" CACHE STRING "Sanitizers to build with, e.g. address;undefined")
if(DYNAMIC_MOE_SANITIZE)
  list(JOIN DYNAMIC_MOE_SANITIZE "," sanitizers)
  add_compile_options(-fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${sanitizers})
endif()
