//! What a dropped future leaves to be done inside a transaction.

use super::{AcquireInside, HeldBefore, State};
use crate::postgres::sql;
use crate::proto::Abandoned;

impl AcquireInside {
    pub(super) fn abandoned(&self) -> Abandoned {
        let reclaim = || sql::reclaim(self.key, self.mode);
        let behind_savepoint =
            || format!("ROLLBACK TO SAVEPOINT {}; {}", self.savepoint(), reclaim());
        let (message, cancel) = match &self.state {
            State::Before | State::Sleep => return Abandoned::default(),
            // The session held the lock, so this is granted without a wait. If it failed or was never sent, so does the
            // message fail: there is no savepoint to release.
            State::Wait { attempt, .. } if self.held_before == HeldBefore::Yes => {
                let message = sql::unlock_behind(self.savepoint(), self.key, self.mode);
                let messages = attempt.is_sent().then(|| message.into());
                return Abandoned {
                    messages: messages.into_iter().collect(),
                    ..Abandoned::broken()
                };
            }
            State::Wait { attempt, millis } if attempt.is_sent() => {
                (behind_savepoint(), *millis > 0)
            }
            // If it was granted, the savepoint has gone; otherwise the transaction may be aborted.
            State::Turn(turn) if turn.waits() => {
                let mut messages = Abandoned::twice(behind_savepoint());
                messages.insert(0, reclaim().into());
                return Abandoned {
                    messages,
                    broken: true,
                    cancel: true,
                    ..Abandoned::default()
                };
            }
            State::Turn(turn) if !turn.may_be_granted() => return Abandoned::broken(),
            // The savepoint has gone, or was never there.
            State::Probe(..) => return Abandoned::broken(),
            _ if self.held_before == HeldBefore::No => (reclaim(), false),
            _ => return Abandoned::broken(),
        };
        Abandoned {
            messages: Abandoned::twice(message),
            broken: true,
            cancel,
            ..Abandoned::default()
        }
    }
}
