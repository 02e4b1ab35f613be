//! Who the processes are that hold or want a lock.

use std::path::Path;
use std::sync::LazyLock;
use std::time::SystemTime;
use std::{env, process};

use dlock_core::{Holder, Mode};

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Other {
    pub(super) id: i64,
    name: Option<String>,
}

/// The one that this is.
pub(super) fn this() -> Other {
    static NAME: LazyLock<Option<String>> = LazyLock::new(|| name_of(&env::current_exe().ok()?));
    Other {
        id: process::id().into(),
        name: NAME.clone(),
    }
}

pub(super) fn holder(other: Other, mode: Mode, granted: bool, since: Option<SystemTime>) -> Holder {
    let since = since
        .and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_micros()).ok());
    let exclusive = i64::from(mode == Mode::Exclusive);
    Holder::from_columns(other.id, other.name, None, exclusive, granted.into(), since)
}

fn name_of(program: &Path) -> Option<String> {
    Some(program.file_name()?.to_string_lossy().into_owned())
}

/// The other processes that have locked a byte: path and inode of the file, and the byte's offset. There is at least
/// one, which may be unknown.
pub(super) fn find(place: Option<(&Path, u64, u64)>, id: Option<i64>) -> Vec<Other> {
    let mut found = place.map(look).unwrap_or_default();
    if found.is_empty() {
        found.push(Other {
            id: id.unwrap_or_default(),
            name: id.is_none().then(|| "another process".into()),
        });
    }
    found
}

/// The kernel does not tell whose the lock of an open file is, but it lists the locks of each open file of processes that
/// this one may look at.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn look((path, inode, at): (&Path, u64, u64)) -> Vec<Other> {
    use std::fs;

    let numbers = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
    };
    let has_locked = |process: &Path| {
        numbers(&process.join("fd")).any(|number| {
            let number = number.to_string();
            // Their path is another one in a container, but ends in the same name.
            let target = fs::read_link(process.join("fd").join(&number));
            let is_it = target.is_ok_and(|target| target.file_name() == path.file_name());
            is_it
                && fs::read_to_string(process.join("fdinfo").join(&number))
                    .is_ok_and(|info| info.lines().any(|line| locks(line, inode, at)))
        })
    };
    numbers(Path::new("/proc"))
        .filter(|id| *id != process::id())
        .filter_map(|id| {
            let process = Path::new("/proc").join(id.to_string());
            has_locked(&process).then(|| Other {
                id: id.into(),
                name: fs::read_link(process.join("exe"))
                    .ok()
                    .and_then(|exe| name_of(&exe)),
            })
        })
        .collect()
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn look(_place: (&Path, u64, u64)) -> Vec<Other> {
    Vec::new()
}

/// Whether the line of `/proc/ID/fdinfo/FD` is a lock on that byte: `lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:INODE FIRST
/// LAST`.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn locks(line: &str, inode: u64, at: u64) -> bool {
    let parts: Vec<&str> = line.split_whitespace().collect();
    let ["lock:", _, "OFDLCK", _, _, _, file, first, last] = parts[..] else {
        return false;
    };
    let is_file = file.rsplit(':').next() == Some(inode.to_string().as_str());
    let first = first.parse().unwrap_or(u64::MAX);
    let last = last.parse().unwrap_or(u64::MAX); // or `EOF`
    is_file && (first..=last).contains(&at)
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_as_the_kernel_writes_them() {
        let line = "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 8 9";
        for at in [8, 9] {
            assert!(locks(line, 1234, at));
        }
        for at in [7, 10] {
            assert!(!locks(line, 1234, at));
        }
        assert!(!locks(line, 234, 8));
        assert!(locks(
            "lock:\t1: OFDLCK  ADVISORY  READ  -1 fe:00:1 0 EOF",
            1,
            99
        ));
        assert!(!locks(
            "lock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:1234 0 EOF",
            1234,
            8
        ));
        assert!(!locks("pos:\t0", 1234, 0));
    }
}
