//! In the place of the lock file, where there is none: locks of databases in files are refused.

use std::path::{Path, PathBuf};

use dlock_core::Mode;

use super::Trouble;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId;

#[derive(Debug)]
pub(super) struct LockFile;

#[derive(Clone, Copy, Debug)]
pub(super) enum Byte {
    Held,
    Waiting,
    Upgrading,
    Claimed,
}

#[derive(Debug)]
pub(super) enum LockedByte {}

const UNSUPPORTED: &str =
    "dlock has no locks for SQLite files on this operating system, only for databases in memory";

pub(super) fn id_of(_database: &Path) -> Result<FileId, Trouble> {
    Ok(FileId)
}

impl LockedByte {
    pub(super) fn mode(&self) -> Mode {
        match *self {}
    }

    pub(super) fn counts(&self, _file: &LockFile) -> bool {
        match *self {}
    }

    pub(super) fn share(&mut self) {
        match *self {}
    }

    pub(super) fn make_exclusive(&mut self) -> Result<bool, Trouble> {
        match *self {}
    }
}

impl LockFile {
    pub(super) fn new(_database: PathBuf, _id: FileId) -> Self {
        Self
    }

    pub(super) fn lock(
        &mut self,
        _key: u64,
        _byte: Byte,
        _mode: Mode,
    ) -> Result<Option<LockedByte>, Trouble> {
        Err(Trouble::unsupported(UNSUPPORTED))
    }

    pub(super) fn elsewhere(&self, _key: u64, _byte: Byte) -> Option<(Mode, Option<i64>)> {
        None
    }

    pub(super) fn look(
        &mut self,
        _key: u64,
        _byte: Byte,
    ) -> Result<Option<(Mode, Option<i64>)>, Trouble> {
        Ok(None)
    }

    pub(super) fn place(&self, _key: u64, _byte: Byte) -> Option<(&Path, u64, u64)> {
        None
    }
}
