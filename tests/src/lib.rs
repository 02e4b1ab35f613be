//! Servers to test dlock on.
