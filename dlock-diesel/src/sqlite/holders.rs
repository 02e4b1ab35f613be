//! Lists who holds a lock and who waits for it, in this process and in others.

use std::time::SystemTime;

use dlock_core::{Holder, Mode};

use super::processes::{self, ForeignLock, Process};

/// Who holds a lock and who waits for it. Each one stands behind its session, or its process if that is another one.
#[derive(Debug, Default)]
pub(super) struct HolderList {
    holders: Vec<(i64, Holder)>,
    waiters: Vec<(i64, Holder)>,
    foreign_holders: Option<(Mode, ForeignLock)>,
    foreign_waiters: Option<ForeignLock>,
}

impl HolderList {
    /// Adds a connection of this process that holds the lock.
    pub(super) fn add_holder(&mut self, session: i64, mode: Mode, since: SystemTime) {
        let holder = processes::holder(processes::current(), mode, true, Some(since));
        self.holders.push((session, holder));
    }

    /// Adds a connection of this process that waits for the lock.
    pub(super) fn add_waiter(&mut self, session: i64, mode: Mode, since: SystemTime) {
        let holder = processes::holder(processes::current(), mode, false, Some(since));
        self.waiters.push((session, holder));
    }

    /// Adds what is known of other processes.
    pub(super) fn add_foreign(
        &mut self,
        holders: Option<(Mode, ForeignLock)>,
        waiters: Option<ForeignLock>,
    ) {
        self.foreign_holders = holders;
        self.foreign_waiters = waiters;
    }

    /// Asks the system for the other processes, which takes a while. Holders come first.
    pub(super) fn complete(self) -> Vec<(i64, Holder)> {
        let mut all = self.holders;
        if let Some((mode, lock)) = self.foreign_holders {
            all.extend(foreign(&lock, mode, true));
        }
        all.extend(self.waiters);
        if let Some(lock) = self.foreign_waiters {
            // The byte does not show in which mode they wait.
            all.extend(foreign(&lock, Mode::Exclusive, false));
        }
        all
    }
}

fn foreign(
    lock: &ForeignLock,
    mode: Mode,
    granted: bool,
) -> impl Iterator<Item = (i64, Holder)> + use<> {
    let processes = lock.find_processes().into_iter();
    processes.map(move |process: Process| {
        let id = process.id;
        (id, processes::holder(process, mode, granted, None))
    })
}
