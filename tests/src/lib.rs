//! Harness for the tests on the real kernel.
