//! Which processes hold a lock or wait for it.

use std::path::Path;
use std::sync::LazyLock;
use std::time::SystemTime;
use std::{env, process};

use dlock_core::{Holder, Mode};

use super::lock_file::BytePlace;

/// A process, as reported to users.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) id: i64,
    name: Option<String>,
}

/// The process that this code runs in.
pub(super) fn current() -> Process {
    static NAME: LazyLock<Option<String>> = LazyLock::new(|| name_of(&env::current_exe().ok()?));
    Process {
        id: process::id().into(),
        name: NAME.clone(),
    }
}

pub(super) fn holder(
    process: Process,
    mode: Mode,
    granted: bool,
    since: Option<SystemTime>,
) -> Holder {
    let since = since
        .and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok())
        .and_then(|since| i64::try_from(since.as_micros()).ok());
    let exclusive = i64::from(mode == Mode::Exclusive);
    Holder::from_columns(
        process.id,
        process.name,
        None,
        exclusive,
        granted.into(),
        since,
    )
}

fn name_of(program: &Path) -> Option<String> {
    Some(program.file_name()?.to_string_lossy().into_owned())
}

/// A byte that at least one other process has locked.
#[derive(Clone, Debug)]
pub(super) struct ForeignLock {
    pub(super) place: Option<BytePlace>,
    /// The process, if the system reported it.
    pub(super) process: Option<i64>,
}

impl ForeignLock {
    /// Asks the system for the processes, which takes a while. At least one, which may be unknown.
    pub(super) fn find_processes(&self) -> Vec<Process> {
        let mut found = self.place.as_ref().map(search).unwrap_or_default();
        if found.is_empty() {
            found.push(Process {
                id: self.process.unwrap_or_default(),
                name: self.process.is_none().then(|| "another process".into()),
            });
        }
        found
    }
}

/// Searches `/proc`. The kernel does not report the owner of a lock of an open file, but it lists the locks of each
/// open file of the processes that this user may inspect.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn search(place: &BytePlace) -> Vec<Process> {
    use std::fs;

    let numbers = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
    };
    let has_locked = |process: &Path| {
        numbers(&process.join("fd")).any(|number| {
            let number = number.to_string();
            // In a container the path differs, but the file name is the same.
            let target = fs::read_link(process.join("fd").join(&number));
            let is_lock_file =
                target.is_ok_and(|target| target.file_name() == place.path.file_name());
            is_lock_file
                && fs::read_to_string(process.join("fdinfo").join(&number)).is_ok_and(|info| {
                    info.lines()
                        .any(|line| is_lock_of(line, place.inode, place.offset))
                })
        })
    };
    numbers(Path::new("/proc"))
        .filter(|id| *id != process::id())
        .filter_map(|id| {
            let process = Path::new("/proc").join(id.to_string());
            has_locked(&process).then(|| Process {
                id: id.into(),
                name: fs::read_link(process.join("exe"))
                    .ok()
                    .and_then(|exe| name_of(&exe)),
            })
        })
        .collect()
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn search(_place: &BytePlace) -> Vec<Process> {
    Vec::new()
}

/// Whether this line of `/proc/ID/fdinfo/FD` is a lock on that byte:
/// `lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:INODE FIRST LAST`.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_lock_of(line: &str, inode: u64, offset: u64) -> bool {
    let parts: Vec<&str> = line.split_whitespace().collect();
    let ["lock:", _, "OFDLCK", _, _, _, file, first, last] = parts[..] else {
        return false;
    };
    let is_file = file.rsplit(':').next() == Some(inode.to_string().as_str());
    let first = first.parse().unwrap_or(u64::MAX);
    let last = last.parse().unwrap_or(u64::MAX); // `EOF`: to the end
    is_file && (first..=last).contains(&offset)
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_as_the_kernel_writes_them() {
        let line = "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 8 9";
        for at in [8, 9] {
            assert!(is_lock_of(line, 1234, at));
        }
        for at in [7, 10] {
            assert!(!is_lock_of(line, 1234, at));
        }
        assert!(!is_lock_of(line, 234, 8));
        assert!(is_lock_of(
            "lock:\t1: OFDLCK  ADVISORY  READ  -1 fe:00:1 0 EOF",
            1,
            99
        ));
        assert!(!is_lock_of(
            "lock:\t1: FLOCK  ADVISORY  WRITE 7 fe:00:1234 0 EOF",
            1234,
            8
        ));
        assert!(!is_lock_of("pos:\t0", 1234, 0));
    }
}
