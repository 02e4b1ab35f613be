//! In the place of byte locks, on systems for which dlock has none.

use std::fs::File;
use std::io;

use dlock_core::Mode;

pub(in crate::sqlite) fn lock(_file: &File, _offset: u64, _mode: Mode) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(in crate::sqlite) fn unlock(_file: &File, _offset: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(in crate::sqlite) fn conflicting(
    _file: &File,
    _offset: u64,
) -> io::Result<Option<(Mode, Option<i64>)>> {
    Err(io::ErrorKind::Unsupported.into())
}
