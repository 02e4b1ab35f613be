//! Whether others who open the database see the lock file: otherwise both of them would get the lock.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sqlite::function_error::FunctionError;

/// Refuses a database whose lock file is not there for everybody who opens the database.
pub(super) fn refuse_hidden(database: &Path, lock_file: &Path) -> Result<(), FunctionError> {
    refuse_network(database)?;
    refuse_mounted_alone(database, lock_file)
}

/// The lock file is called after the database, so each name of it would have a set of locks of its own.
pub(super) fn refuse_other_names(
    database: &Path,
    metadata: &Metadata,
) -> Result<(), FunctionError> {
    if metadata.nlink() <= 1 {
        return Ok(());
    }
    Err(FunctionError::unsupported(format!(
        "{} has {} names (hard links), and each would have its own locks: delete the others, as SQLite requires",
        database.display(),
        metadata.nlink()
    )))
}

/// A container that has mounted the database without its folder sees the database of the others, but not their lock
/// file.
fn refuse_mounted_alone(database: &Path, lock_file: &Path) -> Result<(), FunctionError> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        let folder = match database.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let mounts = [database, folder, lock_file].map(mounts::of);
        if let [Some(database_mount), Some(folder_mount), lock_file_mount] = &mounts {
            let is_alone = database_mount != folder_mount;
            // Mounted as well.
            let is_with = lock_file_mount
                .as_ref()
                .is_some_and(|mount| mount != folder_mount);
            if is_alone && !is_with {
                return Err(FunctionError::unsupported(format!(
                    "{} is mounted without its folder, so others do not see the lock file {}: mount the folder",
                    database.display(),
                    lock_file.display()
                )));
            }
        }
        let file_system = mounts[0]
            .as_ref()
            .and_then(|mount| mounts::file_system(mount));
        if let Some(name) = file_system.filter(|name| SHARED.contains(&name.as_str())) {
            return Err(FunctionError::unsupported(format!(
                "{} is on a file system of other hosts or of the host of this virtual machine ({name}), which may not \
                 see file locks: put the database on a local disk, or use PostgreSQL or MySQL",
                database.display()
            )));
        }
    }
    let _ = (database, lock_file);
    Ok(())
}

/// File systems that `statfs(2)` does not tell from local ones.
#[cfg(any(target_os = "linux", target_os = "android"))]
const SHARED: [&str; 10] = [
    "virtiofs",
    "vboxsf",
    "fuse.vmhgfs-fuse",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.ceph",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.juicefs",
];

#[cfg(any(target_os = "linux", target_os = "android"))]
mod mounts {
    use std::fs::{self, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use nix::libc::O_PATH;

    /// The number of the mount that the file is on. `None` if the system does not tell.
    ///
    /// The file is not really opened: when SQLite's database is closed, the process loses SQLite's locks on it.
    pub(super) fn of(path: &Path) -> Option<String> {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(O_PATH).open(path).ok()?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
        let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        Some(number.trim().to_owned())
    }

    /// The type of the file system of a mount.
    pub(super) fn file_system(mount: &str) -> Option<String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let line = mounts
            .lines()
            .find(|line| line.split(' ').next() == Some(mount))?;
        let (_, behind) = line.split_once(" - ")?;
        Some(behind.split(' ').next()?.to_owned())
    }

    #[test]
    fn the_mount_of_a_folder_is_known_and_that_of_proc_is_another() {
        let [root, proc] = ["/", "/proc/self"].map(|path| of(Path::new(path)).expect("a mount"));
        assert_ne!(root, proc);
        assert_eq!(file_system(&proc).as_deref(), Some("proc"));
    }
}

/// Locks on a network file system may be local to each host, or lost when the network fails. SQLite itself is not safe
/// there.
fn refuse_network(database: &Path) -> Result<(), FunctionError> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Ok(status) = nix::sys::statfs::statfs(database) {
        if let Some(name) = network_name(status.filesystem_type().0 as u32) {
            return Err(FunctionError::unsupported(format!(
                "{} is on a network file system ({name}), where neither file locks nor SQLite are reliable: put \
                 the database on a local disk, or use PostgreSQL or MySQL",
                database.display()
            )));
        }
    }
    let _ = database;
    Ok(())
}

/// The name of the file system if it is one on a network. `statfs(2)` lists these numbers.
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
