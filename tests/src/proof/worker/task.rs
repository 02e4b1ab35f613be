//! What an operation is: drawn at random, before it begins.

use std::time::Duration;

use dlock_diesel::LockKey;

use crate::Kind;
use crate::proof::random::Random;
use crate::proof::worker::Common;
use crate::proof::world::{ACCOUNTS, KEYS, SEMAPHORE, lock_key};

/// What bodies panic with.
pub(crate) const PANIC: &str = "a body of the proof";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// A lock's guard, with a fencing token.
    Guard,
    Run,
    Transaction,
    /// `advisory_xact_lock`, which PostgreSQL has only.
    Xact,
    /// A lock of the session within an open transaction, as `inside_transaction` allows it.
    Inside,
    /// Two locks' guard.
    Several,
    /// Two locks' transaction: a transfer.
    Transfer,
    Semaphore,
    SemaphoreTransaction,
    /// A managed lock's guard, with a fencing token.
    Managed,
    ManagedRun,
    /// Two managed locks' guard.
    ManagedSeveral,
    ManagedSemaphore,
}

impl Form {
    fn is_managed(self) -> bool {
        matches!(
            self,
            Self::Managed | Self::ManagedRun | Self::ManagedSeveral | Self::ManagedSemaphore
        )
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Wait {
    Forever,
    Limit(Duration),
    Try,
}

#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) form: Form,
    pub(crate) names: Vec<&'static str>,
    pub(crate) keys: Vec<LockKey>,
    pub(crate) shared: bool,
    pub(crate) wait: Wait,
    /// In the body.
    pub(crate) pause: Duration,
    pub(crate) draws: bool,
    pub(crate) panics: bool,
    /// The guard is dropped, not released.
    pub(crate) drops: bool,
    /// Async: a wait is cancelled when its future is dropped.
    pub(crate) cancels: bool,
    /// Async: the future is dropped when it has been polled so often.
    pub(crate) polls: Option<u64>,
    /// The wait asks again and again, where it can.
    pub(crate) poll_every: Option<Duration>,
    pub(crate) amount: i64,
    /// The manager's lease is so short that a process that is stopped loses it.
    leased: bool,
}

impl Task {
    pub(crate) fn draw(common: &Common, random: &mut Random) -> Self {
        let options = &common.options;
        let form = match random.below(if options.leases { 48 } else { 24 }) {
            0..6 => Form::Guard,
            6..8 => Form::Run,
            8..10 => Form::Transaction,
            10 => Form::Several,
            11..14 => Form::Transfer,
            14..16 => Form::Semaphore,
            16 => Form::SemaphoreTransaction,
            17 => Form::Inside,
            18 if common.kind == Kind::Postgres => Form::Xact,
            18 => Form::Transaction,
            19..21 => Form::Managed,
            21 => Form::ManagedRun,
            22 => Form::ManagedSeveral,
            23 => Form::ManagedSemaphore,
            24..38 => Form::Managed,
            38..42 => Form::ManagedRun,
            42..45 => Form::ManagedSeveral,
            _ => Form::ManagedSemaphore,
        };
        let (keys, accounts) = match options.operations.is_some() {
            true => (KEYS.len(), ACCOUNTS.len() as u64),
            false => (3, 4),
        };
        let names = match form {
            Form::Several | Form::Transfer | Form::ManagedSeveral => {
                let first = random.below(accounts);
                let second = (first + 1 + random.below(accounts - 1)) % accounts;
                vec![ACCOUNTS[first as usize], ACCOUNTS[second as usize]]
            }
            Form::Semaphore | Form::SemaphoreTransaction | Form::ManagedSemaphore => {
                vec![SEMAPHORE.0]
            }
            _ => vec![*random.pick(&KEYS[..keys])],
        };
        // Where nothing else is broken, futures are dropped more often.
        let (drops, cancels) = match options.operations {
            Some(_) => (70, 75),
            None => (30, 50),
        };
        let alone = matches!(form, Form::Guard | Form::Managed);
        let is_managed = form.is_managed();
        let long = is_managed && options.leases && random.percent(8);
        Self {
            keys: names
                .iter()
                .map(|name| LockKey::from(lock_key(&options.run, name)))
                .collect(),
            shared: alone && common.kind != Kind::Mysql && random.percent(25),
            wait: match random.below(10) {
                0..2 => Wait::Limit(random.micros(1, 60_000)),
                2 => Wait::Try,
                _ => Wait::Forever,
            },
            pause: match random.below(20) {
                _ if options.is_calm() => Duration::ZERO,
                _ if long => random.millis(100, 3000),
                0 => random.millis(5, 25),
                1..8 => random.micros(50, 3000),
                _ => Duration::ZERO,
            },
            draws: random.percent(40),
            panics: options.disturbed && random.percent(3),
            drops: random.percent(25),
            cancels: common.kind != Kind::Sqlite && random.percent(cancels),
            polls: (options.disturbed && options.asynchronous && random.percent(drops))
                .then(|| common.next_polls(form)),
            poll_every: random.percent(15).then(|| random.micros(200, 3000)),
            amount: random.below(9) as i64 - 4,
            leased: options.leases && is_managed,
            form,
            names,
        }
    }

    pub(crate) fn is_managed(&self) -> bool {
        self.form.is_managed()
    }

    /// Whether it needs a connection of the pool: all but managed locks, and those only for a write with their token.
    pub(crate) fn has_connection(&self) -> bool {
        !self.is_managed() || self.is_fenced()
    }

    /// Whether it writes what a token guards.
    pub(crate) fn is_fenced(&self) -> bool {
        matches!(self.form, Form::Guard | Form::Managed) && self.draws && !self.shared
    }

    /// As the history calls it.
    pub(crate) fn mode(&self) -> String {
        match self.form {
            Form::Semaphore | Form::SemaphoreTransaction | Form::ManagedSemaphore => {
                SEMAPHORE.1.to_string()
            }
            _ if self.shared => "shared".to_owned(),
            _ => "exclusive".to_owned(),
        }
    }

    /// As the history calls it.
    pub(crate) fn form(&self) -> String {
        let wait = match self.wait {
            Wait::Forever => "",
            Wait::Limit(_) => "+limit",
            Wait::Try => "+try",
        };
        let poll = match self.poll_every {
            Some(_) if !self.is_managed() && self.names != [SEMAPHORE.0] => "+poll",
            _ => "",
        };
        let lease = if self.leased { "+lease" } else { "" };
        format!("{:?}{wait}{poll}{lease}", self.form)
    }
}
