use std::collections::VecDeque;
use std::time::Duration;

use super::action::{Action, Outcome, QuestionId, Ticket};
use super::conn::{Job, State};
use super::hold::HoldState;
use super::question::{Errand, Question};
use super::slab::Id;
use super::state::Manager;
use crate::proto::{Cause, Failure, Reason};

impl Manager {
    /// A holder wants a fencing token, drawn by the session that has its lock: [`Action::Answer`] follows.
    pub fn draw_token(&mut self, ticket: Ticket, now: Duration) -> QuestionId {
        self.expire_leases(now);
        // Of several locks, the session of the first one draws. The token is greater for all of them.
        let of = self.members_of(ticket).first().copied();
        let question = self.questions.insert(Question { of });
        self.ask_holder(question);
        self.schedule(now);
        QuestionId(question)
    }

    /// Nobody wants to hear the answer any more.
    pub fn forget(&mut self, QuestionId(id): QuestionId) {
        self.questions.remove(id);
    }

    /// Puts a question behind the errands of the connection that has the lock. Readers move, so it may be another one
    /// by the time of the question.
    fn ask_holder(&mut self, id: Id) {
        let conn = self.hold_asked_about(id).map(|(conn, _)| conn);
        match conn.and_then(|conn| self.conns.get_mut(conn)) {
            Some(conn) => conn.errands.push_back(Errand::DrawToken(id)),
            None => self.answer(id, Err(lost())),
        }
    }

    /// The connection and the hold of the lock that a question is about, if it is still held.
    fn hold_asked_about(&self, id: Id) -> Option<(Id, Id)> {
        let ticket = self.questions.get(id)?.of?;
        let hold_id = self.requests.get(ticket)?.hold?;
        let hold = self.holds.get(hold_id)?;
        let held = hold.state == HoldState::Held && hold.tickets.contains(&ticket);
        held.then_some((hold.conn, hold_id))
    }

    /// What to ask about on this connection, whose turn it is. `None`: nothing, or not here.
    pub(super) fn hold_to_draw_for(&mut self, id: Id, conn: Id) -> Option<Id> {
        match self.hold_asked_about(id) {
            Some((of, hold)) if of == conn => Some(hold),
            _ => {
                self.ask_holder(id);
                self.questions_moved = true;
                None
            }
        }
    }

    /// A token was drawn, or not. The session has the lock, but of several locks another one may be lost meanwhile.
    pub(super) fn drawn(&mut self, id: Id, outcome: Outcome) {
        let answer = match outcome {
            _ if self.hold_asked_about(id).is_none() => Err(lost()),
            Outcome::Drawn(token) => Ok(token),
            Outcome::Failed(failure) => Err(failure),
            _ => Err(Reason::Database.clean(Cause::default())),
        };
        self.answer(id, answer);
    }

    /// A connection is gone, and with it the locks that these questions are about, unless they have moved.
    pub(super) fn lose_questions(
        &mut self,
        state: State,
        errands: VecDeque<Errand>,
        failure: &Failure,
    ) {
        if let State::Busy(Job::DrawToken(id)) = state {
            if self.hold_asked_about(id).is_some() {
                self.ask_holder(id);
            } else {
                // Whatever the driver says of the connection, the lock is lost.
                let reason = match failure.reason {
                    Reason::NotHeld => Reason::NotHeld,
                    _ => Reason::Lost,
                };
                let failure = failure.clone();
                self.answer(id, Err(Failure { reason, ..failure }));
            }
        }
        for errand in errands {
            if let Errand::DrawToken(id) = errand {
                self.ask_holder(id);
            }
        }
    }

    fn answer(&mut self, id: Id, answer: Result<crate::FencingToken, Failure>) {
        if self.questions.remove(id).is_some() {
            let answer = Action::Answer(QuestionId(id), answer);
            self.actions.push_back(answer);
        }
    }
}

fn lost() -> Failure {
    Failure::lost(Cause::default())
}
