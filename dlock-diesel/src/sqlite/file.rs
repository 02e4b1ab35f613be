//! The lock file of a database: `NAME-dlock` beside it, always empty. Its bytes are locked without being there.
//!
//! For the lock with number *n*, byte 4*n* is locked by the processes that hold it, byte 4*n* + 1 by those that wait for
//! others to release it, byte 4*n* + 2 by the one that holds it shared and waits to hold it alone, and byte 4*n* + 3 by
//! those that wait for readers, which lets no new ones in. Only the first byte excludes; the others are for order.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;

use dlock_core::Mode;
use nix::libc::O_NOFOLLOW;

use super::{Trouble, os};

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    device: u64,
    pub(super) inode: u64,
}

impl From<Metadata> for FileId {
    fn from(metadata: Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// The file at `path`, which has to be there.
pub(super) fn id_of(database: &Path) -> Result<FileId, Trouble> {
    let metadata = fs::metadata(database).map_err(|error| cannot("find", database, &error))?;
    Ok(metadata.into())
}

/// The lock file, opened when it is needed first.
#[derive(Debug)]
pub(super) struct LockFile {
    database: PathBuf,
    /// The database when its connection was made ready for locks.
    id: FileId,
    path: PathBuf,
    open: Option<Arc<Open>>,
}

#[derive(Debug)]
struct Open {
    file: File,
    id: FileId,
    /// A child that is forked shares the open file, and so the locks: they are not its own to change.
    process: u32,
}

impl Open {
    fn is_own(&self) -> bool {
        self.process == process::id()
    }
}

/// Which of the bytes of a lock.
#[derive(Clone, Copy, Debug)]
pub(super) enum Byte {
    Held = 0,
    Waiting = 1,
    Upgrading = 2,
    Claimed = 3,
}

fn offset(key: u64, byte: Byte) -> u64 {
    4 * key + byte as u64
}

/// A byte that this process has locked, until this is dropped.
#[derive(Debug)]
pub(super) struct LockedByte {
    open: Arc<Open>,
    at: u64,
    mode: Mode,
}

impl Drop for LockedByte {
    fn drop(&mut self) {
        if self.open.is_own() {
            // It fails for no file that could be locked.
            let _ = os::set(&self.open.file, self.at, None);
        }
    }
}

impl LockedByte {
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether other processes see this lock: the lock file is still the one that they open, and so is the database.
    pub(super) fn counts(&self, file: &LockFile) -> bool {
        file.is_current(&self.open) && file.has_database()
    }

    /// Lets readers in. If that fails, they stay out.
    pub(super) fn share(&mut self) {
        if self.mode == Mode::Exclusive
            && self.open.is_own()
            && matches!(
                os::set(&self.open.file, self.at, Some(Mode::Shared)),
                Ok(true)
            )
        {
            self.mode = Mode::Shared;
        }
    }

    /// `false`, and shared as before, if another process shares it.
    pub(super) fn make_exclusive(&mut self) -> Result<bool, Trouble> {
        let alone = self.open.is_own()
            && os::set(&self.open.file, self.at, Some(Mode::Exclusive)).map_err(failed)?;
        if alone {
            self.mode = Mode::Exclusive;
        }
        Ok(alone)
    }
}

impl LockFile {
    pub(super) fn new(database: PathBuf, id: FileId) -> Self {
        let mut path = OsString::from(&database);
        path.push("-dlock");
        Self {
            database,
            id,
            path: path.into(),
            open: None,
        }
    }

    /// Locks the byte, unless another process is in the way.
    pub(super) fn lock(
        &mut self,
        key: u64,
        byte: Byte,
        mode: Mode,
    ) -> Result<Option<LockedByte>, Trouble> {
        // Each time around somebody has put another file in its place.
        for _ in 0..100 {
            let open = self.open()?;
            let at = offset(key, byte);
            let locked = os::set(&open.file, at, Some(mode)).map_err(failed)?;
            let locked = locked.then(|| LockedByte {
                open: Arc::clone(&open),
                at,
                mode,
            });
            if self.is_current(&open) {
                return Ok(locked);
            }
            self.open = None;
        }
        Err(Trouble::other(format!(
            "{} is replaced all the time: let nothing but dlock touch it",
            self.path.display()
        )))
    }

    /// How other processes have the byte locked. Nobody has where this process never asked for a lock.
    pub(super) fn elsewhere(&self, key: u64, byte: Byte) -> Option<(Mode, Option<i64>)> {
        let open = self.open.as_ref()?;
        os::get(&open.file, offset(key, byte)).ok().flatten()
    }

    /// As [`elsewhere`](Self::elsewhere), and opens the file for it.
    pub(super) fn look(
        &mut self,
        key: u64,
        byte: Byte,
    ) -> Result<Option<(Mode, Option<i64>)>, Trouble> {
        if !self.path.exists() {
            return Ok(None);
        }
        self.open()?;
        Ok(self.elsewhere(key, byte))
    }

    /// The path, the inode and the offset of a byte, as the system tells them.
    pub(super) fn place(&self, key: u64, byte: Byte) -> Option<(&Path, u64, u64)> {
        let open = self.open.as_ref()?;
        Some((&self.path, open.id.inode, offset(key, byte)))
    }

    fn has_database(&self) -> bool {
        id_of(&self.database).is_ok_and(|id| id == self.id)
    }

    fn is_current(&self, open: &Open) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|metadata| open.id == metadata.into())
    }

    fn open(&mut self) -> Result<Arc<Open>, Trouble> {
        if id_of(&self.database)? != self.id {
            return Err(Trouble::other(format!(
                "{} is not the file any more that this connection has opened: open it anew",
                self.database.display()
            )));
        }
        if let Some(open) = &self.open {
            if self.is_current(open) {
                return Ok(Arc::clone(open));
            }
        }
        refuse_network(&self.database)?;
        let file = open_or_create(&self.path, &self.database)
            .map_err(|error| cannot("open", &self.path, &error))?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Trouble::unsupported(format!(
                "{} is no plain file: move it away",
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

/// Rust closes it in programs that this process starts. A new one is for those who may use the database.
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
            // What the umask took away, and root's ownership. As far as it goes: who may not use it is told.
            let _ = file.set_permissions(fs::Permissions::from_mode(mode));
            let _ = fchown(&file, Some(database.uid()), Some(database.gid()));
            Ok(file)
        }
        // Another process was faster.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path),
        Err(error) => Err(error),
    }
}

fn cannot(verb: &str, path: &Path, error: &io::Error) -> Trouble {
    let message = format!("cannot {verb} {}: {error}", path.display());
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            Trouble::unsupported(format!(
                "{message}. Locks need that one empty file beside the database: make the folder writable for this user, or \
             the file if it is there already"
            ))
        }
        ErrorKind::NotFound => Trouble::unsupported(format!(
            "{message}. The database is not where it was when this process opened it: close all connections to it, and \
             open it anew"
        )),
        _ => Trouble::other(message),
    }
}

/// What the system says to a lock of a byte.
fn failed(error: io::Error) -> Trouble {
    match error.kind() {
        ErrorKind::Unsupported => Trouble::unsupported(
            "dlock has no locks for SQLite files on this operating system, only for databases in memory",
        ),
        _ => Trouble::other(format!(
            "the operating system refuses to lock a file: {error}"
        )),
    }
}

/// Locks there may be local to each host, or lost on a break of the network: SQLite itself is not safe there.
fn refuse_network(database: &Path) -> Result<(), Trouble> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Ok(status) = nix::sys::statfs::statfs(database) {
        if let Some(name) = network_name(status.filesystem_type().0 as u32) {
            return Err(Trouble::unsupported(format!(
                "{} is on a network file system ({name}), where neither locks of files nor SQLite can be relied on: put \
                 the database on a local disk, or use PostgreSQL or MySQL",
                database.display()
            )));
        }
    }
    let _ = database;
    Ok(())
}

/// The network file systems among those of `statfs(2)`.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn network_name(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x6969 => "NFS",
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x564c => "NCP",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x0102_1997 => "9P",
        0x00c3_6400 => "Ceph",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x2003_0528 => "OrangeFS",
        _ => return None,
    })
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_and_local_ones_are_not() {
        use nix::libc;
        for magic in [
            libc::NFS_SUPER_MAGIC,
            libc::SMB_SUPER_MAGIC,
            libc::NCP_SUPER_MAGIC,
            libc::AFS_SUPER_MAGIC,
            libc::CODA_SUPER_MAGIC,
        ] {
            assert!(network_name(magic as u32).is_some(), "{magic:x}");
        }
        for magic in [
            libc::EXT4_SUPER_MAGIC,
            libc::TMPFS_MAGIC,
            libc::BTRFS_SUPER_MAGIC,
            libc::XFS_SUPER_MAGIC,
            libc::OVERLAYFS_SUPER_MAGIC,
        ] {
            assert_eq!(network_name(magic as u32), None, "{magic:x}");
        }
    }
}
