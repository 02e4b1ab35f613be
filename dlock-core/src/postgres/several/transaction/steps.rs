use std::ops::Range;
use std::time::Duration;

use super::Keys;
use crate::postgres::fault::{aborted, unknown};
use crate::postgres::sql;
use crate::postgres::transaction::AcquireInTransaction;
use crate::proto::{
    Abandoned, Answer, Depth, Hold, Machine, Rows, Session, Several, Step, Steps, Tried, TriedEnd,
    Wait,
};
use crate::{LockKey, PostgresKey};

/// Takes several locks that end with the open transaction. Nothing is given back here: that takes a rollback.
#[derive(Debug)]
pub(in crate::postgres::several) struct TransactionSteps {
    keys: Keys,
    session: Session,
}

impl TransactionSteps {
    pub(in crate::postgres::several) fn several(
        keys: Keys,
        wait: Wait,
        session: Session,
    ) -> Several<Self> {
        Several::new(Self { keys, session }, wait)
    }

    fn named(&self, index: usize) -> Hold<PostgresKey> {
        Hold {
            name: Some(Box::new(self.keys.name(index).clone())),
            ..Hold::new(self.keys.get(index), self.keys.mode, Depth::None, false)
        }
    }
}

impl Steps for TransactionSteps {
    type Key = PostgresKey;
    type Try = TryInTransaction;
    type Wait = AsHold;
    type Back = Nothing;

    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey> {
        self.keys.names.iter()
    }

    fn try_all(&self, range: Range<usize>) -> Option<TryInTransaction> {
        Some(TryInTransaction {
            count: range.len(),
            keys: Keys {
                keys: self.keys.keys[range].to_vec(),
                names: Vec::new(),
                mode: self.keys.mode,
            },
        })
    }

    fn wait(&self, index: usize, wait: Wait) -> AsHold {
        let (key, mode) = (self.keys.get(index), self.keys.mode);
        let acquire = AcquireInTransaction::new(key, mode, wait, self.session);
        AsHold {
            acquire,
            hold: Some(self.named(index)),
        }
    }

    fn hold(&self, index: usize, _tried: &TryInTransaction) -> Hold<PostgresKey> {
        self.named(index)
    }

    fn give_back(&self, _holds: Vec<Hold<PostgresKey>>) -> Nothing {
        Nothing
    }

    fn abandoned(&self, at_work: Abandoned, _held: &[Hold<PostgresKey>]) -> Abandoned {
        at_work
    }
}

/// Tries to take locks of the open transaction, up to the first that is taken.
#[derive(Debug)]
pub(in crate::postgres::several) struct TryInTransaction {
    keys: Keys,
    count: usize,
}

impl Machine for TryInTransaction {
    type Output = Tried;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<Tried> {
        // Behind a pooler, another session may have prepared it.
        Step::Query(sql::try_all_in_transaction(self.keys.all(), self.keys.mode).never_kept())
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<Tried> {
        let tried = |held, end| Step::Done(Ok(Tried { held, end }));
        match answer {
            Answer::Rows(Rows::Number(Some(1))) => tried(self.count, TriedEnd::All),
            Answer::Rows(Rows::Number(Some(place))) if place < 0 => {
                match usize::try_from(place.unsigned_abs()) {
                    Ok(place) if place <= self.count => {
                        tried(place - 1, TriedEnd::Taken(place - 1))
                    }
                    _ => Step::failed(unknown(answer)),
                }
            }
            // Its rollback releases what was taken.
            Answer::Error(error) => Step::failed(aborted(error)),
            answer => Step::failed(unknown(answer)),
        }
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::broken()
    }
}

/// A transaction's lock in the form of a hold.
#[derive(Debug)]
pub(in crate::postgres::several) struct AsHold {
    acquire: AcquireInTransaction,
    hold: Option<Hold<PostgresKey>>,
}

impl AsHold {
    fn follow(&mut self, step: Step<Option<()>>) -> Step<Option<Hold<PostgresKey>>> {
        step.map(|result| Step::Done(result.map(|granted| granted.and_then(|()| self.hold.take()))))
    }
}

impl Machine for AsHold {
    type Output = Option<Hold<PostgresKey>>;

    fn start(&mut self, now: Duration) -> Step<Self::Output> {
        let step = self.acquire.start(now);
        self.follow(step)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<Self::Output> {
        let step = self.acquire.next(answer, now);
        self.follow(step)
    }

    fn abandon(&self) -> Abandoned {
        self.acquire.abandon()
    }
}

/// Says that it is done.
#[derive(Debug)]
pub(in crate::postgres::several) struct Nothing;

impl Machine for Nothing {
    type Output = ();

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<()> {
        Step::Done(Ok(()))
    }

    fn next(&mut self, _answer: Answer, _now: Duration) -> Step<()> {
        Step::Done(Ok(()))
    }

    fn abandon(&self) -> Abandoned {
        Abandoned::default()
    }
}
