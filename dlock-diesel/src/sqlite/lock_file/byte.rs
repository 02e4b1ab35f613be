//! The four bytes of a lock, and where they are.

use std::path::PathBuf;

/// A byte of the lock. The lock with number *n* has the bytes 4*n* to 4*n* + 3.
///
/// Only the first one excludes. The others keep order between processes.
#[derive(Clone, Copy, Debug)]
pub(in crate::sqlite) enum Byte {
    /// Locked by the processes that hold the lock, in the mode in which they hold it.
    Held = 0,
    /// Locked, shared, by processes that wait for another process to release the lock.
    Waiting = 1,
    /// Locked, exclusively, by the process that holds the lock shared and waits to hold it alone.
    Upgrading = 2,
    /// Locked, shared, by processes in which a writer waits for readers: it keeps new readers out.
    Claimed = 3,
}

impl Byte {
    #[cfg_attr(not(unix), expect(dead_code, reason = "there is no lock file"))]
    pub(super) fn offset(self, key: u64) -> u64 {
        4 * key + self as u64
    }
}

/// Where a byte is, in the terms of the operating system's own lists.
#[derive(Clone, Debug)]
#[cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    expect(dead_code, reason = "only Linux has such lists")
)]
pub(in crate::sqlite) struct BytePlace {
    pub(in crate::sqlite) path: PathBuf,
    pub(in crate::sqlite) inode: u64,
    pub(in crate::sqlite) offset: u64,
}
