//! Locks on single bytes of a file, by the operating system.
//!
//! They belong to the open file, not to a thread: who asks twice through one open file is not in its own way. The kernel
//! frees them when the file is closed, and so when the process ends, however it ends.

pub(super) use imp::{get, set};

#[cfg(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
))]
mod imp {
    use std::fs::File;
    use std::io;

    use dlock_core::Mode;
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock};

    fn byte(at: u64, kind: c_int) -> flock {
        flock {
            l_type: kind as _,
            l_whence: SEEK_SET as _,
            l_start: at.try_into().expect("BUG: keys are below 2^61"),
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

    /// Locks the byte, changes the lock's mode, or unlocks it. `false` if another process is in the way; then all is as
    /// it was.
    pub(in crate::sqlite) fn set(file: &File, at: u64, mode: Option<Mode>) -> io::Result<bool> {
        let lock = byte(at, mode.map_or(F_UNLCK as _, kind));
        loop {
            // The locks of an open file, which no other descriptor that this process closes takes along.
            #[cfg(not(target_vendor = "apple"))]
            let result = fcntl(file, FcntlArg::F_OFD_SETLK(&lock));
            // Nix has them for Linux only. These end when the process closes any descriptor of the file.
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

    /// How another process has the byte locked, and its process id if the system tells it.
    pub(in crate::sqlite) fn get(file: &File, at: u64) -> io::Result<Option<(Mode, Option<i64>)>> {
        let mut lock = byte(at, F_WRLCK as _);
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
}

#[cfg(not(any(
    all(
        any(target_os = "linux", target_os = "android"),
        target_pointer_width = "64"
    ),
    target_vendor = "apple"
)))]
mod imp {
    use std::fs::File;
    use std::io;

    use dlock_core::Mode;

    pub(in crate::sqlite) fn set(_file: &File, _at: u64, _mode: Option<Mode>) -> io::Result<bool> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in crate::sqlite) fn get(
        _file: &File,
        _at: u64,
    ) -> io::Result<Option<(Mode, Option<i64>)>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
