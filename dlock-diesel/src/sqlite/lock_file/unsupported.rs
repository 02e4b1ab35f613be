//! In the place of lock files, on systems for which dlock has none: it refuses locks of databases in files.

use std::path::{Path, PathBuf};

use dlock_core::Mode;

use super::byte::{Byte, BytePlace};
use crate::sqlite::function_error::FunctionError;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::sqlite) struct FileId;

#[derive(Debug)]
pub(in crate::sqlite) struct LockFile;

#[derive(Debug)]
pub(in crate::sqlite) enum LockedByte {}

pub(in crate::sqlite) fn id_of(_database: &Path) -> Result<FileId, FunctionError> {
    Ok(FileId)
}

impl LockedByte {
    pub(in crate::sqlite) fn mode(&self) -> Mode {
        match *self {}
    }

    pub(in crate::sqlite) fn is_seen(&self, _file: &LockFile) -> bool {
        match *self {}
    }

    pub(in crate::sqlite) fn share(&mut self) {
        match *self {}
    }

    pub(in crate::sqlite) fn make_exclusive(&mut self) -> Result<bool, FunctionError> {
        match *self {}
    }
}

impl LockFile {
    pub(in crate::sqlite) fn new(_database: PathBuf, _id: FileId) -> Self {
        Self
    }

    pub(in crate::sqlite) fn lock(
        &mut self,
        _key: u64,
        _byte: Byte,
        _mode: Mode,
    ) -> Result<Option<LockedByte>, FunctionError> {
        Err(FunctionError::unsupported_system())
    }

    pub(in crate::sqlite) fn draw_token(
        &mut self,
        _least: i64,
    ) -> Result<Option<i64>, FunctionError> {
        Err(FunctionError::unsupported_system())
    }

    pub(in crate::sqlite) fn locked_elsewhere(
        &self,
        _key: u64,
        _byte: Byte,
    ) -> Option<(Mode, Option<i64>)> {
        None
    }

    pub(in crate::sqlite) fn open_and_check(
        &mut self,
        _key: u64,
        _byte: Byte,
    ) -> Result<Option<(Mode, Option<i64>)>, FunctionError> {
        Ok(None)
    }

    pub(in crate::sqlite) fn place(&self, _key: u64, _byte: Byte) -> Option<BytePlace> {
        None
    }
}
