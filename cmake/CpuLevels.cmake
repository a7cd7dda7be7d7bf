# SPDX-License-Identifier: Apache-2.0
# The flags of csrc/common/isa_flags.txt, which setup.py reads too:
#   DYNAMIC_MOE_BASE_FLAGS      flags of every C++ file
#   DYNAMIC_MOE_ALL_LEVELS      CPU levels of the table, worst first
#   DYNAMIC_MOE_LEVELS          those that this compiler can compile
#   DYNAMIC_MOE_FLAGS_<level>   flags of the files named *_cpu_<level>.cpp
include(CheckCXXCompilerFlag)

set(flag_file ${PROJECT_SOURCE_DIR}/csrc/common/isa_flags.txt)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${flag_file})
file(STRINGS ${flag_file} lines REGEX "^[a-z]")

set(DYNAMIC_MOE_ALL_LEVELS "")
set(DYNAMIC_MOE_LEVELS "")
foreach(line IN LISTS lines)
  separate_arguments(flags UNIX_COMMAND "${line}")
  list(POP_FRONT flags name)
  if(name STREQUAL "base")
    set(DYNAMIC_MOE_BASE_FLAGS ${flags})
    continue()
  endif()
  list(APPEND DYNAMIC_MOE_ALL_LEVELS ${name})
  set(DYNAMIC_MOE_FLAGS_${name} ${flags})
  if(name STREQUAL "scalar")
    list(APPEND DYNAMIC_MOE_LEVELS ${name})
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    string(JOIN " " joined ${flags})
    check_cxx_compiler_flag("${joined}" DYNAMIC_MOE_COMPILES_${name})
    if(DYNAMIC_MOE_COMPILES_${name})
      list(APPEND DYNAMIC_MOE_LEVELS ${name})
    endif()
  endif()
endforeach()
list(JOIN DYNAMIC_MOE_LEVELS " " joined)
message(STATUS "CPU levels compiled: ${joined}")

# Which of them this machine can run, asked of the library's own detection.
if(NOT CMAKE_CROSSCOMPILING AND NOT DEFINED DYNAMIC_MOE_RUNNABLE_LEVELS)
  set(definitions "")
  foreach(level IN LISTS DYNAMIC_MOE_LEVELS)
    string(TOUPPER ${level} upper)
    list(APPEND definitions -DDYNAMIC_MOE_HAS_${upper}=1)
  endforeach()
  try_run(
    ran compiled SOURCES ${PROJECT_SOURCE_DIR}/cmake/print_runnable_levels.cpp
    ${PROJECT_SOURCE_DIR}/csrc/common/isa.cpp ${PROJECT_SOURCE_DIR}/csrc/common/cpu_features.cpp
    ${PROJECT_SOURCE_DIR}/csrc/common/tile_permission.cpp
    CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${PROJECT_SOURCE_DIR}/csrc
    COMPILE_DEFINITIONS ${definitions}
    CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON
    COMPILE_OUTPUT_VARIABLE compile_output
    RUN_OUTPUT_STDOUT_VARIABLE run_output
    RUN_OUTPUT_STDERR_VARIABLE run_errors)
  if(NOT compiled OR NOT ran EQUAL 0)
    message(FATAL_ERROR "Cannot tell which CPU levels this machine runs:\n${compile_output}\n${run_output}${run_errors}")
  endif()
  if(run_errors)
    message(WARNING "${run_errors}")
  endif()
  string(STRIP "${run_output}" run_output)
  set(DYNAMIC_MOE_RUNNABLE_LEVELS "${run_output}" CACHE STRING "CPU levels that the tests run at")
endif()
list(JOIN DYNAMIC_MOE_RUNNABLE_LEVELS " " joined)
message(STATUS "CPU levels tested: ${joined}")
