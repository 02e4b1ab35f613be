use std::time::Duration;

use super::action::{Action, ConnId, News};
use super::config::Config;
use super::conn::{Conn, Job, State};
use super::hold::HoldState;
use super::line::Asking;
use super::slab::Id;
use super::state::{Closing, Manager};
use crate::proto::{Cause, Failure, Reason};

impl Manager {
    /// Declares everything lost that other sessions may soon have, before anything else happens.
    pub(super) fn expire_leases(&mut self, now: Duration) {
        let silent: Vec<_> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.given_up_at(&self.config).is_some_and(|at| at <= now))
            .map(|(id, conn)| (id, conn.state))
            .collect();
        for (id, state) in silent {
            if matches!(state, State::Closing { .. }) {
                // It has lost everything already, and the driver knows.
                self.conns.remove(id);
                continue;
            }
            let failure = Failure::lost(Cause::default());
            self.lose(id, &failure, now);
            // It no longer counts: the server ends that session by itself.
            self.conns.remove(id);
            self.actions.push_back(Action::Close(ConnId(id)));
            if matches!(state, State::Opening { .. }) {
                let failure = Reason::NotOpened.clean(Cause::default());
                self.no_connection(failure, now);
            }
        }
    }

    /// Takes everything from a connection: its conversation has failed, and what it held is lost.
    pub(super) fn lose(&mut self, id: Id, failure: &Failure, now: Duration) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let state = std::mem::replace(&mut conn.state, State::Closing { since: now });
        let holds = std::mem::take(&mut conn.holds);
        let errands = std::mem::take(&mut conn.errands);
        let mut lines = Vec::new();
        if let State::Busy(Job::Acquire { hold, .. }) = state {
            lines.extend(self.holds.remove(hold).map(|hold| hold.line));
            if let Some(line) = lines.first() {
                self.ask_lost(*line, failure, now);
            }
        }
        if holds > 0 {
            let on_it = self.holds.iter().filter(|(_, hold)| hold.conn == id);
            let lost: Vec<_> = on_it.map(|(hold, _)| hold).collect();
            for hold in lost {
                lines.extend(self.lose_hold(hold, failure));
            }
        }
        self.lose_questions(state, errands, failure);
        // A loss is told before anybody else is granted the lock.
        self.hear_of_groups(now);
        lines.into_iter().for_each(|line| self.serve(line, now));
    }

    fn lose_hold(&mut self, id: Id, failure: &Failure) -> Option<Id> {
        let hold = self.holds.remove(id)?;
        if let HoldState::Releasing(Some(ticket)) = hold.state {
            self.end(ticket, News::NotReleased(failure.clone()));
        }
        for ticket in hold.tickets {
            self.end(ticket, News::Lost);
        }
        self.lines
            .get_mut(hold.line)?
            .holds
            .retain(|hold| *hold != id);
        Some(hold.line)
    }

    /// A conversation that asked for a line's lock lost its connection. The line asks again on another, but not for
    /// ever: the conversation itself may be what ends sessions.
    fn ask_lost(&mut self, id: Id, failure: &Failure, now: Duration) {
        let Some(line) = self.lines.get_mut(id) else {
            return;
        };
        line.asking = Asking::No;
        // Otherwise it is the question who has the lock that loses connections.
        line.silent &= matches!(failure.reason, Reason::Timeout { .. });
        line.losses += 1;
        if line.losses >= Config::LOSSES {
            line.losses = 0;
            self.ask_failed(id, failure.clone(), now);
        }
    }

    /// Closes a connection. What it holds is lost.
    pub(super) fn shut(&mut self, id: Id, now: Duration) {
        if self.conns.get(id).is_none_or(Conn::is_closing) {
            return;
        }
        self.lose(id, &Reason::Lost.clean(Cause::default()), now);
        self.actions.push_back(Action::Close(ConnId(id)));
    }

    /// A connection could not be opened. Who waits is told if there is no other.
    pub(super) fn no_connection(&mut self, failure: Failure, now: Duration) {
        self.back_off(now);
        if self.conns.iter().any(|(_, conn)| !conn.is_closing()) {
            return;
        }
        for id in self.requests.ids() {
            if self
                .requests
                .get(id)
                .is_some_and(|request| request.hold.is_none())
            {
                self.end(id, News::Failed(failure.clone()));
            }
        }
        for line in self.lines.ids() {
            self.serve(line, now);
        }
    }

    pub(super) fn back_off(&mut self, now: Duration) {
        let doubled = Config::FIRST_BACKOFF * (1 << self.open_failures.min(10));
        self.open_failures += 1;
        self.open_after = now + doubled.min(Config::LAST_BACKOFF);
    }

    /// The session is there.
    pub(super) fn alive(&mut self, id: Id, now: Duration) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        // An answer as old as the lease confirms nothing: it is asked once more.
        let certain = conn.certain_until(&self.config);
        let old = certain.is_some_and(|until| until <= now);
        if old || !std::mem::take(&mut conn.unconfirmed) {
            return;
        }
        let confirmed: Vec<_> = self
            .holds
            .iter()
            .filter(|(_, hold)| hold.conn == id && hold.state == HoldState::Confirming)
            .map(|(hold, _)| hold)
            .collect();
        for hold in confirmed {
            self.hold(hold, now);
        }
    }

    pub(super) fn finish_closing(&mut self) {
        if self.closing == Some(Closing::Begun) && self.conns.len() == 0 {
            self.closing = Some(Closing::Told);
            self.actions.push_back(Action::Closed);
        }
    }
}
