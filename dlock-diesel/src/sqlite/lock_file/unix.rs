//! Lock files on Unix.

mod token;

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;

use dlock_core::Mode;
use nix::libc::O_NOFOLLOW;

use super::byte::{Byte, BytePlace};
use super::visible;
use crate::sqlite::byte_lock;
use crate::sqlite::function_error::FunctionError;

/// Identifies a file whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::sqlite) struct FileId {
    device: u64,
    inode: u64,
}

impl From<Metadata> for FileId {
    fn from(metadata: Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Identifies the database, which has to exist.
pub(in crate::sqlite) fn id_of(database: &Path) -> Result<FileId, FunctionError> {
    metadata_of(database).map(FileId::from)
}

fn metadata_of(database: &Path) -> Result<Metadata, FunctionError> {
    fs::metadata(database).map_err(|error| cannot("find", database, &error))
}

/// The lock file, opened at the first lock.
#[derive(Debug)]
pub(in crate::sqlite) struct LockFile {
    database: PathBuf,
    /// The database as it was when its connection was made ready for locks.
    database_id: FileId,
    path: PathBuf,
    open: Option<Arc<Open>>,
}

#[derive(Debug)]
struct Open {
    file: File,
    id: FileId,
    /// A forked child shares the open file, and so its locks. It must not change them.
    process: u32,
}

impl Open {
    fn is_own(&self) -> bool {
        self.process == process::id()
    }
}

/// A byte that this process has locked. Dropping it unlocks the byte.
#[derive(Debug)]
pub(in crate::sqlite) struct LockedByte {
    open: Arc<Open>,
    offset: u64,
    mode: Mode,
}

impl Drop for LockedByte {
    fn drop(&mut self) {
        if self.open.is_own() {
            // Unlocking does not fail on a file that could be locked.
            let _ = byte_lock::unlock(&self.open.file, self.offset);
        }
    }
}

impl LockedByte {
    pub(in crate::sqlite) fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether other processes see this lock: they still open the same lock file, and the same database.
    pub(in crate::sqlite) fn is_seen(&self, file: &LockFile) -> bool {
        file.is_current(&self.open) && file.has_database()
    }

    /// Lets readers of other processes in. They stay out if that fails.
    pub(in crate::sqlite) fn share(&mut self) {
        if self.mode == Mode::Exclusive
            && self.open.is_own()
            && matches!(
                byte_lock::lock(&self.open.file, self.offset, Mode::Shared),
                Ok(true)
            )
        {
            self.mode = Mode::Shared;
        }
    }

    /// Returns `false`, and leaves the byte shared, if another process shares it.
    pub(in crate::sqlite) fn make_exclusive(&mut self) -> Result<bool, FunctionError> {
        let alone = self.open.is_own()
            && byte_lock::lock(&self.open.file, self.offset, Mode::Exclusive)
                .map_err(system_error)?;
        if alone {
            self.mode = Mode::Exclusive;
        }
        Ok(alone)
    }
}

impl LockFile {
    pub(in crate::sqlite) fn new(database: PathBuf, database_id: FileId) -> Self {
        let mut path = OsString::from(&database);
        path.push("-dlock");
        Self {
            database,
            database_id,
            path: path.into(),
            open: None,
        }
    }

    /// Locks the byte. Returns `None` if another process is in the way.
    pub(in crate::sqlite) fn lock(
        &mut self,
        key: u64,
        byte: Byte,
        mode: Mode,
    ) -> Result<Option<LockedByte>, FunctionError> {
        // Another round means that somebody has replaced the lock file meanwhile.
        for _ in 0..100 {
            let open = self.open()?;
            let offset = byte.offset(key);
            let locked = byte_lock::lock(&open.file, offset, mode).map_err(system_error)?;
            let locked = locked.then(|| LockedByte {
                open: Arc::clone(&open),
                offset,
                mode,
            });
            if self.is_current(&open) {
                return Ok(locked);
            }
            self.open = None;
        }
        Err(FunctionError::other(format!(
            "{} was replaced again and again while dlock locked it: let nothing but dlock touch it",
            self.path.display()
        )))
    }

    /// How another process has locked the byte, and its id if the system reports it. `None` as long as this process has
    /// not opened the lock file.
    pub(in crate::sqlite) fn locked_elsewhere(
        &self,
        key: u64,
        byte: Byte,
    ) -> Option<(Mode, Option<i64>)> {
        let open = self.open.as_ref()?;
        byte_lock::conflicting(&open.file, byte.offset(key))
            .ok()
            .flatten()
    }

    /// The same as [`locked_elsewhere`](Self::locked_elsewhere), but opens an existing lock file for it.
    pub(in crate::sqlite) fn open_and_check(
        &mut self,
        key: u64,
        byte: Byte,
    ) -> Result<Option<(Mode, Option<i64>)>, FunctionError> {
        if !self.path.exists() {
            return Ok(None);
        }
        self.open()?;
        Ok(self.locked_elsewhere(key, byte))
    }

    /// Where the byte is. `None` as long as this process has not opened the lock file.
    pub(in crate::sqlite) fn place(&self, key: u64, byte: Byte) -> Option<BytePlace> {
        let open = self.open.as_ref()?;
        Some(BytePlace {
            path: self.path.clone(),
            inode: open.id.inode,
            offset: byte.offset(key),
        })
    }

    fn has_database(&self) -> bool {
        id_of(&self.database).is_ok_and(|id| id == self.database_id)
    }

    fn is_current(&self, open: &Open) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|metadata| open.id == metadata.into())
    }

    fn open(&mut self) -> Result<Arc<Open>, FunctionError> {
        let database = metadata_of(&self.database)?;
        visible::refuse_other_names(&self.database, &database)?;
        if self.database_id != database.into() {
            return Err(FunctionError::other(format!(
                "{} is no longer the file that this connection opened: reconnect",
                self.database.display()
            )));
        }
        if let Some(open) = &self.open {
            if self.is_current(open) {
                return Ok(Arc::clone(open));
            }
        }
        visible::refuse_hidden(&self.database, &self.path)?;
        let file = open_or_create(&self.path, &self.database)
            .map_err(|error| cannot("open", &self.path, &error))?;
        let metadata = file.metadata().map_err(system_error)?;
        if !metadata.is_file() {
            return Err(FunctionError::unsupported(format!(
                "{} is not a regular file: move it away",
                self.path.display()
            )));
        }
        let id = metadata.into();
        let process = process::id();
        let open = Arc::new(Open { file, id, process });
        self.open = Some(Arc::clone(&open));
        Ok(open)
    }
}

/// Rust opens files so that programs started by this process do not inherit them. A new file gets the permissions and
/// the owner of the database.
fn open_or_create(path: &Path, database: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_NOFOLLOW);
    match options.open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        opened => return opened,
    }
    let database = fs::metadata(database)?;
    let mode = database.mode() & 0o666;
    match options.clone().create_new(true).mode(mode).open(path) {
        Ok(file) => {
            // Undo the umask, and when running as root give the file to the database's owner. Best effort: a user who
            // cannot open the file gets an error that says so.
            let _ = file.set_permissions(fs::Permissions::from_mode(mode));
            let _ = fchown(&file, Some(database.uid()), Some(database.gid()));
            Ok(file)
        }
        // Another process was faster.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path),
        Err(error) => Err(error),
    }
}

fn cannot(verb: &str, path: &Path, error: &io::Error) -> FunctionError {
    let message = format!("cannot {verb} {}: {error}", path.display());
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            FunctionError::unsupported(format!(
                "{message}: locks need this one file beside the database; make the folder writable for this \
                 user, or the file itself if it exists"
            ))
        }
        ErrorKind::NotFound => FunctionError::unsupported(format!(
            "{message}: the database is not where it was when this process opened it; close all connections to it \
             and reconnect"
        )),
        _ => FunctionError::other(message),
    }
}

/// The error of a system call on the lock file.
fn system_error(error: io::Error) -> FunctionError {
    match error.kind() {
        ErrorKind::Unsupported => FunctionError::unsupported_system(),
        _ => FunctionError::other(format!(
            "the operating system reported an error on the lock file: {error}"
        )),
    }
}
