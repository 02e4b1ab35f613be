//! One session of a PostgreSQL server, as far as a lock goes: all that can come of each message.

use dlock_core::{Answer, Piece, Step};

/// A message of the machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Try { mark: Option<i64> },
    TryInTransaction,
    AskHeld,
    Reclaim,
    BackAndReclaim,
    Wait,
    WaitInOpenTransaction,
    WaitForTransaction,
    Undo,
    Begin,
    BeginWaiting,
    RollBack,
    HandOver,
    Unlock,
    UnlockFenced,
    ReadUnlocked,
    ReleaseAborted,
    ReleaseIfGranted { mark: i64 },
    EndSession,
}

impl Sent {
    /// `None` for a sleep.
    pub(crate) fn of(step: &Step) -> Option<Sent> {
        match step {
            Step::Query(statement) => {
                let mark = match statement.pieces.as_slice() {
                    [Piece::Sql(start), Piece::BigInt(mark), ..]
                        if start.starts_with("SELECT (CASE WHEN $1 = 0 ") =>
                    {
                        Some(*mark)
                    }
                    _ => None,
                };
                Some(Sent::read(&statement.text(), mark))
            }
            Step::Batch(text) => Some(Sent::read(text, None)),
            Step::Sleep(_) => None,
            Step::Done(_) => panic!("over"),
        }
    }

    pub(crate) fn of_text(text: &str) -> Sent {
        Sent::read(text, None)
    }

    fn read(text: &str, mark: Option<i64>) -> Sent {
        let starts = |start: &str| text.starts_with(start);
        let number = |before: &str| -> Option<i64> {
            let (_, rest) = text.split_once(before)?;
            Some(rest.split('\'').next()?.parse().unwrap())
        };
        if let Some(unread) =
            text.strip_prefix("SELECT set_config('statement_timeout', '0', true); ")
        {
            return Sent::of_text(unread);
        }
        match text {
            "ROLLBACK" => Sent::RollBack,
            "SELECT current_setting('dlock.unlocked')::bigint" => Sent::ReadUnlocked,
            <dlock_core::Postgres as dlock_core::Dialect>::END_SESSION => Sent::EndSession,
            _ if starts("SELECT pg_try_advisory_lock") => Sent::Try { mark: None },
            _ if starts("SELECT (CASE WHEN $1 = 0 THEN pg_advisory_unlock") => match mark {
                Some(0) => Sent::Unlock,
                mark => Sent::Try { mark },
            },
            _ if starts("SELECT pg_try_advisory_xact_lock") => Sent::TryInTransaction,
            _ if starts("SELECT (EXISTS(") => Sent::AskHeld,
            _ if starts("SELECT CASE WHEN EXISTS(") => Sent::Reclaim,
            _ if starts("SELECT pg_advisory_unlock") => Sent::Unlock,
            _ if starts("SELECT CASE WHEN current_setting('dlock.granted', true) = ") => {
                Sent::ReleaseIfGranted {
                    mark: number("true) = '").unwrap(),
                }
            }
            _ if starts("DO $dlock$ BEGIN PERFORM CASE WHEN now() <> statement_timestamp() ") => {
                Sent::Wait
            }
            _ if starts("RELEASE SAVEPOINT dlock_")
                && text.contains("; SELECT set_config('dlock.unlocked', ") =>
            {
                Sent::UnlockFenced
            }
            _ if starts("SAVEPOINT dlock_") && text.contains("; RELEASE SAVEPOINT ") => {
                Sent::WaitForTransaction
            }
            _ if starts("SAVEPOINT dlock_") => Sent::WaitInOpenTransaction,
            _ if starts("BEGIN; /* dlock: ") => Sent::Begin,
            _ if starts("BEGIN; SELECT pg_advisory_xact_lock") => Sent::HandOver,
            _ if starts("ROLLBACK; BEGIN; ") => Sent::BeginWaiting,
            _ if starts("ROLLBACK TO SAVEPOINT ") && text.contains("; DO ") => Sent::ReleaseAborted,
            _ if starts("ROLLBACK TO SAVEPOINT ")
                && text.contains("; SELECT CASE WHEN EXISTS(") =>
            {
                Sent::BackAndReclaim
            }
            _ if starts("ROLLBACK TO SAVEPOINT ") => Sent::Undo,
            _ => panic!("unknown: {text}"),
        }
    }
}

/// What the server says of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Says {
    Done,
    Value(i64),
    Null,
    /// Any error.
    Fails,
    /// Any error but that of a limit.
    FailsWithoutAWait,
    /// An error of a block, which says nothing of the lock.
    Interrupted,
    /// An error that did not come out of a block.
    FailsOutside,
    /// With this CONSTRAINT.
    Tells(&'static str),
}

/// The lock was not granted.
const REFUSALS: [&str; 5] = ["55P03", "40P01", "42883", "0A000", "DL001"];

impl Says {
    fn fails(self) -> bool {
        !matches!(self, Says::Done | Says::Value(_) | Says::Null)
    }

    pub(crate) fn is(self, answer: &Answer) -> bool {
        let constraint = match answer {
            Answer::Error(constraint) => Some(constraint.as_deref()),
            _ => None,
        };
        match self {
            Says::Done => *answer == Answer::Done,
            Says::Value(number) => *answer == Answer::Value(Some(number)),
            Says::Null => *answer == Answer::Value(None),
            Says::Fails => constraint.is_some(),
            Says::FailsWithoutAWait => constraint.is_some_and(|code| code != Some("55P03")),
            Says::Interrupted => constraint
                .flatten()
                .is_some_and(|code| !REFUSALS.contains(&code)),
            Says::FailsOutside => constraint == Some(None),
            Says::Tells(text) => constraint == Some(Some(text)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transaction {
    None,
    Open,
    Aborted,
}

/// The session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    /// How often it holds the lock.
    pub(crate) holds: u32,
    /// Its transaction does, too.
    pub(crate) transaction_holds: bool,
    pub(crate) transaction: Transaction,
    /// Our savepoint is there.
    pub(crate) fence: bool,
    pub(crate) ended: bool,
    granted: Option<i64>,
    unlocked: bool,
    /// The undo has failed once. It does not fail again: that would be the third cancel in a row.
    undo_failed: bool,
}

/// What may come of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Result {
    pub(crate) says: Says,
    pub(crate) session: Session,
}

impl Session {
    pub(crate) fn new(holds: u32, transaction: Transaction) -> Self {
        Session {
            holds,
            transaction_holds: false,
            transaction,
            fence: false,
            ended: false,
            granted: None,
            unlocked: false,
            undo_failed: false,
        }
    }

    pub(crate) fn fenced(self) -> Self {
        Session {
            fence: true,
            ..self
        }
    }

    fn granted(self, mark: Option<i64>) -> Self {
        Session {
            holds: self.holds + 1,
            granted: mark.or(self.granted),
            ..self
        }
    }

    fn unlocked(self) -> Self {
        if self.holds == 0 {
            return self;
        }
        Session {
            holds: self.holds - 1,
            ..self
        }
    }

    fn rolled_back(self) -> Self {
        Session {
            transaction: Transaction::None,
            transaction_holds: false,
            fence: false,
            ..self
        }
    }

    fn begun(self) -> Self {
        Session {
            transaction: Transaction::Open,
            ..self
        }
    }

    fn aborted(self) -> Self {
        match self.transaction {
            Transaction::None => self,
            _ => Session {
                transaction: Transaction::Aborted,
                ..self
            },
        }
    }

    /// All that may come of a message, except that the connection is gone: then nothing is held.
    pub(crate) fn receive(self, sent: &Sent) -> Vec<Result> {
        let aborted = self.transaction == Transaction::Aborted;
        let mut results = Vec::new();
        let mut says = |says, session| results.push(Result { says, session });
        // Failed, after the lock was granted or released.
        let mut late = Vec::new();
        match sent {
            Sent::RollBack => {
                says(Says::Done, self.rolled_back());
                says(Says::Fails, self);
            }
            Sent::BeginWaiting => {
                let begun = self.rolled_back().begun();
                let granted = Session {
                    transaction_holds: true,
                    ..begun
                };
                says(Says::Done, granted);
                says(Says::Fails, begun.aborted());
                says(Says::FailsOutside, self.rolled_back());
                says(Says::FailsOutside, self);
            }
            Sent::Undo if self.fence => {
                let undone = Session {
                    transaction: Transaction::Open,
                    transaction_holds: false,
                    fence: false,
                    granted: None,
                    undo_failed: false,
                    ..self
                };
                says(Says::Done, undone);
                if !self.undo_failed {
                    let failed = Session {
                        undo_failed: true,
                        ..self.aborted()
                    };
                    says(Says::Fails, failed);
                }
            }
            Sent::ReleaseAborted if self.fence => {
                let again = self.aborted();
                says(Says::FailsOutside, again);
                if self.holds > 0 {
                    says(Says::Tells("dlock_released"), again.unlocked());
                    late.push((Says::FailsOutside, again.unlocked()));
                } else {
                    says(Says::Tells("dlock_not_held"), again);
                }
            }
            Sent::EndSession => says(
                Says::Fails,
                Session {
                    ended: true,
                    ..Session::new(0, Transaction::None)
                },
            ),
            Sent::BackAndReclaim if self.fence => {
                let back = Session {
                    transaction: Transaction::Open,
                    transaction_holds: false,
                    granted: None,
                    ..self
                };
                let reclaimed = match back.holds {
                    0 => back,
                    _ => back.unlocked(),
                };
                says(Says::Done, reclaimed);
                says(Says::Fails, self.aborted());
                says(Says::Fails, back.aborted());
                late.push((Says::Fails, reclaimed.aborted()));
            }
            // Nothing else is obeyed.
            _ if aborted => says(Says::FailsOutside, self),
            Sent::Undo | Sent::ReleaseAborted | Sent::BackAndReclaim => {
                says(Says::FailsOutside, self.aborted())
            }
            Sent::Try { mark } => {
                says(Says::Value(1), self.granted(*mark));
                // Who has it already is granted it again.
                if self.holds == 0 {
                    says(Says::Value(0), self);
                }
                says(Says::Fails, self);
                late.push((Says::Fails, self.granted(None)));
            }
            Sent::TryInTransaction => {
                let granted = Session {
                    transaction_holds: true,
                    ..self
                };
                says(Says::Value(1), granted);
                if self.holds == 0 {
                    says(Says::Value(0), self);
                }
                says(Says::Fails, self.aborted());
                late.push((Says::Fails, granted.aborted()));
            }
            Sent::AskHeld => {
                says(Says::Value((self.holds > 0).into()), self);
                says(Says::Fails, self.aborted());
            }
            Sent::Reclaim => {
                if self.holds > 0 {
                    says(Says::Value(1), self.unlocked());
                    late.push((Says::Fails, self.unlocked().aborted()));
                } else {
                    says(Says::Null, self);
                }
                says(Says::Fails, self.aborted());
            }
            Sent::Wait => {
                says(Says::Done, self.granted(None));
                says(Says::Fails, self);
                late.push((Says::Interrupted, self.granted(None)));
                late.push((Says::FailsOutside, self.granted(None)));
            }
            Sent::WaitInOpenTransaction => {
                let fenced = self.fenced();
                says(Says::Done, fenced.granted(None));
                says(
                    if self.holds == 0 {
                        Says::Fails
                    } else {
                        Says::FailsWithoutAWait
                    },
                    fenced.aborted(),
                );
                says(Says::FailsOutside, self.aborted());
                late.push((Says::Interrupted, fenced.granted(None).aborted()));
                late.push((Says::FailsOutside, fenced.granted(None).aborted()));
            }
            Sent::WaitForTransaction => {
                let granted = Session {
                    transaction_holds: true,
                    ..self
                };
                says(Says::Done, granted);
                says(Says::Fails, self.fenced().aborted());
                says(Says::FailsOutside, self.aborted());
                late.push((Says::Interrupted, granted.fenced().aborted()));
                late.push((Says::FailsOutside, granted.fenced().aborted()));
            }
            Sent::Begin => {
                let begun = self.begun();
                let granted = Session {
                    transaction_holds: true,
                    ..begun
                };
                says(Says::Done, granted);
                says(Says::Fails, begun.aborted());
                says(Says::Fails, self);
                late.push((Says::Fails, granted.aborted()));
            }
            Sent::HandOver => {
                let begun = self.begun();
                let handed_over = Session {
                    transaction_holds: true,
                    ..begun.unlocked()
                };
                says(Says::Done, handed_over);
                says(Says::Fails, self);
                says(Says::Fails, begun.aborted());
                late.push((Says::Fails, handed_over.aborted()));
            }
            Sent::Unlock => {
                says(Says::Value((self.holds > 0).into()), self.unlocked());
                says(Says::Fails, self.aborted());
                late.push((Says::Fails, self.unlocked().aborted()));
            }
            Sent::UnlockFenced => {
                says(Says::FailsOutside, self.aborted());
                if self.fence {
                    let released = Session {
                        fence: false,
                        ..self
                    };
                    let unlocked = Session {
                        unlocked: self.holds > 0,
                        ..released.unlocked()
                    };
                    says(Says::FailsOutside, released.aborted());
                    says(Says::Done, unlocked);
                    late.push((Says::FailsOutside, unlocked.aborted()));
                }
            }
            Sent::ReadUnlocked => {
                says(Says::Value(self.unlocked.into()), self);
                says(Says::Fails, self.aborted());
            }
            Sent::ReleaseIfGranted { mark } => says(
                Says::Done,
                if self.granted == Some(*mark) {
                    self.unlocked()
                } else {
                    self
                },
            ),
        }
        results.extend(
            late.into_iter()
                .map(|(says, session)| Result { says, session }),
        );
        results
    }

    /// What the session may be when nobody reads the answer to the last message: that may not have been sent, and it
    /// may have failed.
    pub(crate) fn receive_unread(self, last: Option<&Sent>) -> Vec<Session> {
        let received = last.map_or_else(Vec::new, |last| self.receive(last));
        let received = received.into_iter().map(|result| result.session);
        std::iter::once(self).chain(received).collect()
    }

    /// A message is sent and obeyed, and its answer is not read.
    pub(crate) fn obey(self, sent: &Sent) -> Session {
        let results = self.receive(sent);
        let obeyed = results.iter().find(|result| !result.says.fails());
        obeyed.unwrap_or(&results[0]).session
    }

    /// A message is sent and cancelled.
    pub(crate) fn cancelled(self, sent: &Sent) -> Vec<Session> {
        let results = self.receive(sent).into_iter();
        let failed = results.filter(|result| result.says.fails());
        failed.map(|result| result.session).collect()
    }
}
