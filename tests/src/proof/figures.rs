//! What a history counts.

use std::collections::{BTreeMap, BTreeSet};

use crate::proof::check::{ends_session, holds};
use crate::proof::history::{History, Mode};

/// Numbers of one or more rounds.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Operations on locks.
    pub operations: u64,
    /// Times that a lock was held.
    pub holds: u64,
    /// Futures that were dropped before they were done.
    pub dropped: u64,
    /// The different ones among them: the form, and after how many polls.
    pub awaits: BTreeSet<(String, u64)>,
    /// Bodies that panicked.
    pub panics: u64,
    /// Fencing tokens that were drawn.
    pub tokens: u64,
    /// Writes with a token that changed nothing: their writer had lost the lock.
    pub refused: u64,
    /// What was broken, and how often.
    pub faults: BTreeMap<String, u64>,
    /// How operations ended.
    pub results: BTreeMap<String, u64>,
    /// Times that several sessions held one lock in shared mode, or one semaphore.
    pub together: u64,
    /// Holds that a fault cut short: their session or their process had ended.
    pub cut_short: u64,
    /// Locks that were held when everybody had gone.
    pub kept: u64,
    /// The longest time from the end of a holder (its process, its session, its connection) until the lock was held again by
    /// one that had waited before, in nanoseconds.
    pub longest_free: u64,
    /// The longest time until a lock was free, when all processes had ended, in nanoseconds.
    pub longest_end: u64,
    /// The same from the moment that a process was stopped, or its network fell silent, while it had a managed lock.
    pub longest_lease: u64,
    /// What must not have happened.
    pub violations: u64,
}

impl Figures {
    /// Of one history.
    pub fn of(history: &History, violations: usize) -> Self {
        let mut figures = Self {
            operations: history.ops.len() as u64,
            kept: history.kept.len() as u64,
            longest_end: history.freed.iter().copied().max().unwrap_or(0),
            violations: violations as u64,
            ..Self::default()
        };
        for op in &history.ops {
            figures.holds += u64::from(op.entered.is_some());
            figures.tokens += u64::from(op.token.is_some());
            figures.refused += op.writes.iter().filter(|write| !write.changed).count() as u64;
            if let Some(polls) = op.polls {
                let form = op.form.split('+').next().unwrap_or_default();
                figures.awaits.insert((form.to_owned(), polls));
            }
            if let Some((_, result, _)) = &op.ended {
                figures.dropped += u64::from(result == "dropped");
                figures.panics += u64::from(result == "panic");
                *figures.results.entry(result.clone()).or_default() += 1;
            }
        }
        for fault in &history.faults {
            *figures.faults.entry(fault.kind.clone()).or_default() += 1;
        }
        figures.again(history);
        figures
    }

    /// How long a lock was held by nobody after its holder had ended, while another waited for it.
    fn again(&mut self, history: &History) {
        let holds = holds(history);
        let mut by_key: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for hold in &holds {
            by_key.entry(&hold.what).or_default().push(hold);
        }
        for holds in by_key.values() {
            for pair in holds.windows(2) {
                let [before, next] = [pair[0], pair[1]];
                self.together += u64::from(before.to > next.from && before.op.mode == Mode::Shared);
                let ended = history.faults.iter().find(|fault| {
                    fault.from == before.to
                        && (fault.kind == "kill"
                            && fault.worker.as_ref() == Some(&before.op.worker)
                            || ends_session(history, fault, before.op))
                });
                if let Some(fault) = ended {
                    self.cut_short += 1;
                    // A restart takes as long as it takes.
                    if next.op.asked < fault.from
                        && fault.kind != "restart"
                        && before.to <= next.from
                    {
                        self.longest_free = self.longest_free.max(next.from - fault.from);
                    }
                }
                let leased = history.faults.iter().find(|fault| {
                    matches!(fault.kind.as_str(), "stop" | "silence")
                        && fault.worker.as_ref() == Some(&before.op.worker)
                        && before.op.is_managed()
                        && (before.from..=next.from).contains(&fault.from)
                        && next.from < fault.until
                        && next.op.asked < fault.from
                        && next.op.worker != before.op.worker
                });
                if let Some(fault) = leased {
                    self.longest_lease = self.longest_lease.max(next.from - fault.from);
                }
            }
        }
    }

    /// Adds those of another round.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.holds += other.holds;
        self.dropped += other.dropped;
        self.awaits.extend(other.awaits.iter().cloned());
        self.refused += other.refused;
        self.panics += other.panics;
        self.tokens += other.tokens;
        self.together += other.together;
        self.cut_short += other.cut_short;
        self.kept += other.kept;
        self.violations += other.violations;
        self.longest_free = self.longest_free.max(other.longest_free);
        self.longest_end = self.longest_end.max(other.longest_end);
        self.longest_lease = self.longest_lease.max(other.longest_lease);
        for (kind, count) in &other.faults {
            *self.faults.entry(kind.clone()).or_default() += count;
        }
        for (result, count) in &other.results {
            *self.results.entry(result.clone()).or_default() += count;
        }
    }
}
