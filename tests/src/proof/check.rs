//! What a history must not show. No I/O, no clock, no random number.
//!
//! A hold lasts from a moment at which its process knew that it had the lock to the last such moment: from after the
//! grant to before the release. So two holds that overlap were a violation at each moment of the overlap, however slow
//! the machine was.
//!
//! A hold ends earlier where the contract says so: when its process was killed, or when the session that holds the lock
//! was ended, cut off or restarted. For a managed lock that is also so, because its manager asks each session only every
//! 0.75 seconds. The locks of a transaction end with it, on PostgreSQL at the error that aborts it, before the client hears
//! of it. A network that is silent and a process that is stopped are no such reasons.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::proof::history::{Fault, History, Mode, Op};

/// Until a manager must have noticed that a session is gone, on a slow machine: 0.75 seconds and a round trip on an idle
/// one.
const NOTICED: u64 = 5_000_000_000;

/// What a history shows that must not happen. Empty: nothing.
pub fn check(history: &History) -> Vec<String> {
    let mut wrong = Vec::new();
    let holds = holds(history);
    overlaps(&holds, &mut wrong);
    semaphores(history, &mut wrong);
    tokens(history, &holds, &mut wrong);
    writes(history, &holds, &mut wrong);
    counters(history, &mut wrong);
    ends(history, &mut wrong);
    pools(history, &mut wrong);
    told(history, &mut wrong);
    for (value, expected) in &history.sums {
        if value != expected {
            wrong.push(format!(
                "the sum of the accounts is {value}, not {expected}"
            ));
        }
    }
    wrong.extend(
        history
            .kept
            .iter()
            .map(|key| format!("{key} was not freed when everybody had gone")),
    );
    wrong.extend(
        history
            .dirty
            .iter()
            .map(|who| format!("a connection of the pool held a lock: {who}")),
    );
    wrong.extend(history.wrong.iter().cloned());
    wrong
}

/// As [`check`], of the text of a history.
///
/// # Errors
///
/// If a line cannot be read.
pub fn check_text(text: &str) -> Result<Vec<String>, String> {
    let mut history = History::default();
    history.read(text)?;
    Ok(check(&history))
}

/// A moment of belief: what was held, from when until when.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    pub(crate) op: &'a Op,
    /// A key, or a slot of a semaphore.
    pub(crate) what: String,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Hold<'_> {
    fn is_exclusive(&self) -> bool {
        self.op.mode != Mode::Shared
    }

    fn describe(&self) -> String {
        let Op {
            actor,
            number,
            form,
            ..
        } = self.op;
        format!("{actor}/{number} ({form}) {}..{}", self.from, self.to)
    }
}

/// All holds, cut short where the contract allows it.
pub(crate) fn holds(history: &History) -> Vec<Hold<'_>> {
    let mut holds = Vec::new();
    for op in &history.ops {
        let Some((from, to)) = held(history, op) else {
            continue;
        };
        for key in &op.keys {
            let what = match op.slot {
                Some(slot) => format!("{key}#{slot}"),
                None => key.clone(),
            };
            holds.push(Hold { op, what, from, to });
        }
    }
    holds.sort_by_key(|hold| hold.from);
    holds
}

fn held(history: &History, op: &Op) -> Option<(u64, u64)> {
    let from = op.entered?;
    let mut to = match (op.left, op.is_managed()) {
        (Some(left), _) => left,
        (None, true) => op.looked,
        (None, false) => op.ended.as_ref().map_or(u64::MAX, |(time, ..)| *time),
    };
    if is_of_transaction(op) && may_have_failed(history, op, from, to) {
        to = from;
    }
    for fault in &history.faults {
        if ends_process(fault, op) {
            to = to.min(fault.from);
        } else if ends_session(history, fault, op) {
            if op.is_managed() && from >= fault.from {
                return None;
            }
            to = to.min(fault.from);
        }
    }
    (from <= to).then_some((from, to))
}

fn is_of_transaction(op: &Op) -> bool {
    ["Transaction", "Transfer", "Xact"]
        .iter()
        .any(|form| op.form.starts_with(form))
}

/// Whether a statement may have failed meanwhile, also one whose answer nobody has read.
fn may_have_failed(history: &History, op: &Op, from: u64, to: u64) -> bool {
    match op.ended.as_ref().map(|(_, result, _)| result.as_str()) {
        Some("ok" | "panic") => false,
        Some("dropped") | None => history.faults.iter().any(|fault| {
            let hits = match fault.kind.as_str() {
                "cancel" => fault.session == op.session,
                "full" => true,
                _ => false,
            };
            hits && fault.from <= to && fault.until >= from
        }),
        Some(_) => true,
    }
}

fn ends_process(fault: &Fault, op: &Op) -> bool {
    fault.kind == "kill" && fault.worker.as_ref() == Some(&op.worker)
}

/// Whether the fault may have ended the session that held the lock.
pub(crate) fn ends_session(history: &History, fault: &Fault, op: &Op) -> bool {
    let hits = match fault.kind.as_str() {
        "end" if op.is_managed() => history.opened.iter().any(|(worker, session)| {
            *worker == op.worker && Some(session) == fault.session.as_ref()
        }),
        "end" => fault.session == op.session,
        "cut" | "half" | "answer" => fault.worker.as_ref() == Some(&op.worker),
        "restart" => true,
        _ => false,
    };
    hits && match op.is_managed() {
        true => op.asked < noticed(history, fault, &op.worker),
        false => op.opened < fault.until,
    }
}

/// Until when a manager that runs must have noticed a fault.
fn noticed(history: &History, fault: &Fault, worker: &str) -> u64 {
    let stopped = history.faults.iter().filter(|other| {
        matches!(other.kind.as_str(), "stop" | "silence" | "delay")
            && other.worker.as_deref() == Some(worker)
            && other.from < fault.until + NOTICED
            && other.until > fault.from
    });
    stopped.map(|stop| stop.until).fold(fault.until, u64::max) + NOTICED
}

fn overlaps(holds: &[Hold<'_>], wrong: &mut Vec<String>) {
    // The last one to leave so far: of all, and of the exclusive ones.
    let mut last: HashMap<&str, [Option<&Hold<'_>>; 2]> = HashMap::new();
    for hold in holds {
        let [any, exclusive] = last.entry(&hold.what).or_default();
        let before = if hold.is_exclusive() {
            *any
        } else {
            *exclusive
        };
        if let Some(before) = before.filter(|before| before.to > hold.from) {
            wrong.push(format!(
                "two hold {} at once: {} and {}",
                hold.what,
                before.describe(),
                hold.describe()
            ));
        }
        let later = |before: &Option<&Hold<'_>>| before.is_none_or(|before| before.to < hold.to);
        if later(any) {
            *any = Some(hold);
        }
        if hold.is_exclusive() && later(exclusive) {
            *exclusive = Some(hold);
        }
    }
}

fn semaphores(history: &History, wrong: &mut Vec<String>) {
    for op in history.ops.iter().filter(|op| op.entered.is_some()) {
        match (op.mode, op.slot) {
            (Mode::Permits(permits), Some(slot)) if slot < permits => {}
            (Mode::Permits(_), slot) => wrong.push(format!(
                "{}/{} is inside with slot {slot:?}",
                op.actor, op.number
            )),
            _ => {}
        }
    }
}

/// A token is greater than those of all earlier holders, and than all that were drawn before its lock was asked for.
fn tokens(history: &History, holds: &[Hold<'_>], wrong: &mut Vec<String>) {
    let mut of_holders: HashMap<&str, (i64, &Hold<'_>)> = HashMap::new();
    for hold in holds.iter().filter(|hold| hold.op.mode == Mode::Exclusive) {
        let Some((_, token)) = hold.op.token else {
            continue;
        };
        if let Some((earlier, before)) = of_holders
            .get(hold.what.as_str())
            .filter(|(earlier, _)| *earlier >= token)
        {
            wrong.push(format!(
                "token {token} of {} is not above {earlier} of the earlier holder {}",
                hold.describe(),
                before.describe()
            ));
        }
        of_holders.insert(&hold.what, (token, hold));
    }
    // Of whatever lock, and whether or not the one who drew it still held the lock then.
    let drawn = history.ops.iter().filter_map(|op| Some((op.token?, op)));
    let mut drawn: Vec<_> = drawn.map(|((time, token), op)| (time, token, op)).collect();
    let mut asked = drawn.clone();
    drawn.sort_by_key(|(time, ..)| *time);
    asked.sort_by_key(|(.., op)| op.asked);
    let (mut greatest, mut at) = (i64::MIN, 0);
    for (_, token, op) in asked {
        while let Some((_, earlier, _)) = drawn.get(at).filter(|(time, ..)| *time < op.asked) {
            greatest = greatest.max(*earlier);
            at += 1;
        }
        if token <= greatest {
            let Op { actor, number, .. } = op;
            wrong.push(format!(
                "token {token} of {actor}/{number} is not above {greatest}, drawn before"
            ));
        }
    }
}

/// What a token guards: writes in order, and none of a holder refused.
fn writes(history: &History, holds: &[Hold<'_>], wrong: &mut Vec<String>) {
    let mut accepted: BTreeMap<&str, Vec<(u64, u64, i64)>> = BTreeMap::new();
    for op in &history.ops {
        for write in op.writes.iter().filter(|write| write.changed) {
            accepted
                .entry(&write.key)
                .or_default()
                .push((write.from, write.at, write.token));
        }
    }
    for (key, mut writes) in accepted {
        let mut done = writes.clone();
        writes.sort_by_key(|(from, ..)| *from);
        done.sort_by_key(|(_, at, _)| *at);
        let (mut greatest, mut next) = (i64::MIN, 0);
        for (from, _, token) in writes {
            while let Some((.., earlier)) = done.get(next).filter(|(_, at, _)| *at < from) {
                greatest = greatest.max(*earlier);
                next += 1;
            }
            if token <= greatest {
                wrong.push(format!("{key} accepted token {token} after {greatest}"));
            }
        }
    }
    for hold in holds.iter().filter(|hold| hold.op.mode == Mode::Exclusive) {
        for write in hold
            .op
            .writes
            .iter()
            .filter(|write| !write.changed && write.at <= hold.to)
        {
            wrong.push(format!(
                "{} refused token {} of its holder {}",
                write.key,
                write.token,
                hold.describe()
            ));
        }
    }
}

/// No increment is lost, and none happens twice.
fn counters(history: &History, wrong: &mut Vec<String>) {
    let mut seen: HashSet<(&str, i64)> = HashSet::new();
    let mut counts: HashMap<&str, (i64, i64)> = HashMap::new();
    for op in &history.ops {
        for (key, value) in &op.added {
            counts.entry(key).or_default().0 += 1;
            if !seen.insert((key, *value)) {
                wrong.push(format!(
                    "two set the counter {key} to {value}: {}/{} is the second",
                    op.actor, op.number
                ));
            }
        }
        for (key, _) in op.adding.iter().filter(|added| !op.added.contains(added)) {
            counts.entry(key).or_default().1 += 1;
        }
    }
    for (key, value) in &history.counters {
        let (sure, unsure) = counts.get(key.as_str()).copied().unwrap_or_default();
        if *value < sure || *value > sure + unsure {
            wrong.push(format!("the counter {key} is {value} after {sure} increments and {unsure} without an answer"));
        }
    }
}

/// Every operation ends, and every error has a cause.
fn ends(history: &History, wrong: &mut Vec<String>) {
    let killed: HashSet<&str> = history
        .faults
        .iter()
        .filter(|fault| fault.kind == "kill")
        .filter_map(|fault| fault.worker.as_deref())
        .collect();
    for op in &history.ops {
        let Some((time, result, text)) = &op.ended else {
            if !killed.contains(op.worker.as_str()) {
                wrong.push(format!(
                    "{}/{} ({}) never ended",
                    op.actor, op.number, op.form
                ));
            }
            continue;
        };
        if !may_end(history, op, *time, result) {
            let Op {
                actor,
                number,
                form,
                ..
            } = op;
            wrong.push(format!(
                "{actor}/{number} ({form}) ended with {result} at {time} without a cause: {text}"
            ));
        }
    }
}

fn may_end(history: &History, op: &Op, time: u64, result: &str) -> bool {
    let causes: &[&str] = match result {
        "ok" | "dropped" | "panic" => return true,
        "busy" => return op.form.contains("+try"),
        "Timeout" => return op.form.contains("+limit"),
        // On a slow machine a short lease passes by itself, or before a connection is open.
        "Lost" | "NotConnected" if op.form.contains("+lease") => return true,
        "Interrupted" => &["cancel", "end", "restart"],
        "Lost" => &[
            "end", "cut", "half", "answer", "silence", "stop", "restart", "cancel",
        ],
        "Database" => &[
            "end", "cut", "half", "answer", "silence", "restart", "cancel", "full",
        ],
        "NotConnected" => &[
            "cut", "half", "answer", "silence", "restart", "full", "stop", "delay", "end", "cancel",
        ],
        "TooManyLocks" => &["full"],
        _ => return false,
    };
    history.faults.iter().any(|fault| {
        let since = match op.is_managed() {
            true => op.asked.saturating_sub(6 * NOTICED),
            false => op.opened,
        };
        let hits = match (&fault.worker, &fault.session) {
            (Some(worker), _) => *worker == op.worker,
            (None, Some(session)) => op.is_managed() || Some(session) == op.session.as_ref(),
            (None, None) => true,
        };
        causes.contains(&fault.kind.as_str()) && hits && fault.from <= time && fault.until >= since
    })
}

/// A connection that a pool hands on works, unless something was broken.
fn pools(history: &History, wrong: &mut Vec<String>) {
    for unfit in &history.unfit {
        let caused = history.faults.iter().any(|fault| {
            let hits = match (&fault.worker, &fault.session) {
                (Some(worker), _) => *worker == unfit.worker,
                (None, Some(session)) => *session == unfit.session,
                (None, None) => true,
            };
            let breaks = !matches!(fault.kind.as_str(), "kill" | "stop" | "delay");
            breaks && hits && fault.from <= unfit.at && fault.until >= unfit.opened
        });
        if !caused {
            wrong.push(format!(
                "the pool of {} handed on session {}, which failed at {}: {}",
                unfit.worker, unfit.session, unfit.at, unfit.text
            ));
        }
    }
}

/// A manager tells its holders that a session is gone.
fn told(history: &History, wrong: &mut Vec<String>) {
    for op in history.ops.iter().filter(|op| op.is_managed()) {
        let Some(entered) = op.entered else { continue };
        for fault in &history.faults {
            let latest = || noticed(history, fault, &op.worker) + NOTICED;
            if entered < fault.from
                && op.looked > fault.until + 2 * NOTICED
                // Of all sessions of the manager only for these.
                && matches!(fault.kind.as_str(), "cut" | "half" | "answer" | "restart")
                && ends_session(history, fault, op)
                && op.looked > latest()
            {
                let Op { actor, number, .. } = op;
                wrong.push(format!(
                    "{actor}/{number} lost its lock at {} and still had it at {}",
                    fault.from, op.looked
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests;
