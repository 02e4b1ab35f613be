//! Locks on single bytes of a file, from the operating system.
//!
//! A lock belongs to the open file, not to a thread: two requests through one open file never conflict. The kernel
//! frees the locks when the file is closed, and so when the process ends, for whatever reason.

#[cfg(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
))]
mod fcntl;
#[cfg(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
))]
pub(super) use fcntl::{conflicting, lock, unlock};

#[cfg(not(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
)))]
mod unsupported;
#[cfg(not(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
)))]
pub(super) use unsupported::{conflicting, lock, unlock};
