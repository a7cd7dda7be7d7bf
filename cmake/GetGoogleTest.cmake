# SPDX-License-Identifier: Apache-2.0
# GoogleTest: the installed one, else Debian's packages unpacked into the build folder, else fetched from its repository.
find_package(GTest CONFIG QUIET)

if(NOT GTest_FOUND OR NOT TARGET GTest::gmock_main)
  find_program(APT_GET apt-get)
  find_program(DPKG_DEB dpkg-deb)
  set(packages ${CMAKE_BINARY_DIR}/debian)
  if(APT_GET AND DPKG_DEB AND NOT EXISTS ${packages}/usr)
    file(MAKE_DIRECTORY ${packages})
    # Only downloads: needs no root and changes nothing outside the build folder.
    execute_process(
      COMMAND ${APT_GET} download googletest libgtest-dev libgmock-dev
      WORKING_DIRECTORY ${packages} RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
    file(GLOB archives ${packages}/*.deb)
    if(NOT failed)
      foreach(archive IN LISTS archives)
        execute_process(COMMAND ${DPKG_DEB} --extract ${archive} ${packages} COMMAND_ERROR_IS_FATAL ANY)
      endforeach()
    endif()
  endif()
  find_package(GTest CONFIG QUIET PATHS ${packages}/usr NO_DEFAULT_PATH)
endif()

if(GTest_FOUND AND TARGET GTest::gmock_main)
  message(STATUS "GoogleTest: ${GTest_DIR}")
else()
  message(STATUS "GoogleTest: fetching it")
  include(FetchContent)
  set(INSTALL_GTEST OFF)
  FetchContent_Declare(
    googletest
    GIT_REPOSITORY https://github.com/google/googletest.git
    GIT_TAG 52eb8108c5bdec04579160ae17225d66034bd723 # v1.17.0
  )
  FetchContent_MakeAvailable(googletest)
endif()
