//! Byte locks by `fcntl(2)`.

use std::fs::File;
use std::io;

use dlock_core::Mode;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock};

/// Locks the byte, or changes the mode of the lock. Returns `false`, and changes nothing, if another process is in the
/// way.
pub(in crate::sqlite) fn lock(file: &File, offset: u64, mode: Mode) -> io::Result<bool> {
    set(file, offset, kind(mode))
}

pub(in crate::sqlite) fn unlock(file: &File, offset: u64) -> io::Result<()> {
    set(file, offset, F_UNLCK as _).map(|_| ())
}

/// The lock of another process that keeps this one from locking the byte alone: its mode, and the process's id if the
/// system reports it.
pub(in crate::sqlite) fn conflicting(
    file: &File,
    offset: u64,
) -> io::Result<Option<(Mode, Option<i64>)>> {
    let mut lock = byte(offset, F_WRLCK as _);
    #[cfg(not(target_vendor = "apple"))]
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    #[cfg(target_vendor = "apple")]
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    let mode = match c_int::from(lock.l_type) {
        kind if kind == c_int::from(F_WRLCK) => Mode::Exclusive,
        kind if kind == c_int::from(F_RDLCK) => Mode::Shared,
        _ => return Ok(None),
    };
    let id = (lock.l_pid > 0).then_some(lock.l_pid.into());
    Ok(Some((mode, id)))
}

fn set(file: &File, offset: u64, kind: c_int) -> io::Result<bool> {
    let lock = byte(offset, kind);
    loop {
        // The locks of an open file: closing another descriptor of the same file does not free them.
        #[cfg(not(target_vendor = "apple"))]
        let result = fcntl(file, FcntlArg::F_OFD_SETLK(&lock));
        // Nix has those for Linux only. These locks end when the process closes any descriptor of the file.
        #[cfg(target_vendor = "apple")]
        let result = fcntl(file, FcntlArg::F_SETLK(&lock));
        return match result {
            Ok(_) => Ok(true),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        };
    }
}

fn byte(offset: u64, kind: c_int) -> flock {
    flock {
        l_type: kind as _,
        l_whence: SEEK_SET as _,
        l_start: offset.try_into().expect("BUG: keys are below 2^61"),
        l_len: 1,
        l_pid: 0,
    }
}

fn kind(mode: Mode) -> c_int {
    match mode {
        Mode::Exclusive => F_WRLCK as _,
        Mode::Shared => F_RDLCK as _,
    }
}
