use std::time::Duration;

use super::action::{News, Outcome};
use super::hold::HoldState;
use super::line::Asking;
use super::question::Errand;
use super::slab::Id;
use super::state::Manager;
use crate::proto::Failure;

impl Manager {
    /// Gives a hold to the first request of a line.
    pub(super) fn grant(&mut self, ticket: Id, hold_id: Id) {
        let Some(request) = self.requests.get_mut(ticket) else {
            return;
        };
        request.hold = Some(hold_id);
        if let Some(until) = request.until.take() {
            self.limits.remove(&(until, ticket));
        }
        if let Some(line) = self.lines.get_mut(request.line) {
            debug_assert_eq!(line.queue.front(), Some(&ticket));
            line.queue.pop_front();
        }
        if let Some(hold) = self.holds.get_mut(hold_id) {
            hold.tickets.push(ticket);
            hold.turns += 1;
            let slot = hold.slot;
            self.tell_granted(ticket, slot);
        }
    }

    pub(super) fn release_unused(&mut self, id: Id) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        if hold.state == HoldState::Held && hold.tickets.is_empty() {
            hold.state = HoldState::Releasing(None);
            if let Some(conn) = self.conns.get_mut(hold.conn) {
                conn.errands.push_back(Errand::Release(id));
            }
        }
    }

    /// A holder gives its hold back, and `wants_to_know`.
    pub(super) fn give_back(&mut self, ticket: Id, wants_to_know: bool, now: Duration) {
        let Some((line, hold_id)) = self
            .requests
            .get(ticket)
            .and_then(|request| Some((request.line, request.hold?)))
        else {
            return;
        };
        if let Some(hold) = self.holds.get_mut(hold_id) {
            hold.tickets.retain(|holder| *holder != ticket);
        }
        if !wants_to_know {
            self.leave(ticket);
        }
        self.serve(line, now);
        if !wants_to_know {
            return;
        }
        match self.holds.get_mut(hold_id) {
            Some(hold) if matches!(hold.state, HoldState::Releasing(None)) => {
                hold.state = HoldState::Releasing(Some(ticket));
            }
            _ => self.end(ticket, News::Released),
        }
    }

    /// The server has answered a line.
    pub(super) fn acquired(&mut self, hold_id: Id, waited: bool, outcome: Outcome, now: Duration) {
        let Some(hold) = self.holds.get(hold_id) else {
            return;
        };
        let (id, conn_id) = (hold.line, hold.conn);
        let (Some(line), Some(conn)) = (self.lines.get_mut(id), self.conns.get_mut(conn_id)) else {
            return;
        };
        line.losses = 0;
        let until = match std::mem::replace(&mut line.asking, Asking::No) {
            Asking::Now { until, .. } => until,
            _ => None,
        };
        if waited {
            // Others that wait for a connection to wait on come first.
            line.order = None;
        }
        if let Outcome::Granted { slot } = outcome {
            conn.holds += 1;
            line.order = None;
            line.pause = None;
            line.silent = false;
            let stale = now.saturating_sub(conn.renewed) > self.config.stale();
            line.holds.push(hold_id);
            if let Some(hold) = self.holds.get_mut(hold_id) {
                hold.state = HoldState::Confirming;
                hold.slot = slot;
            }
            conn.unconfirmed |= stale;
            if !stale {
                self.hold(hold_id, now);
            }
            return;
        }
        self.holds.remove(hold_id);
        match outcome {
            Outcome::Taken { holders } => self.ask_taken(id, until, holders, now),
            Outcome::Failed(failure) => self.ask_failed(id, failure, now),
            _ => {}
        }
        self.serve(id, now);
    }

    /// A line has a new hold. Readers of an older one move to it.
    pub(super) fn hold(&mut self, hold_id: Id, now: Duration) {
        let Some(hold) = self.holds.get_mut(hold_id) else {
            return;
        };
        hold.state = HoldState::Held;
        hold.since = now;
        let id = hold.line;
        // Slots of a semaphore are held side by side.
        let line = self.lines.get(id).filter(|line| !line.is_semaphore());
        let older = line.map(|line| line.holds.clone());
        for older in older.unwrap_or_default() {
            if older == hold_id {
                continue;
            }
            let moved = self
                .holds
                .get_mut(older)
                .map(|hold| std::mem::take(&mut hold.tickets));
            let moved = moved.unwrap_or_default();
            for ticket in &moved {
                if let Some(request) = self.requests.get_mut(*ticket) {
                    request.hold = Some(hold_id);
                }
            }
            if let Some(hold) = self.holds.get_mut(hold_id) {
                hold.tickets.extend(moved);
            }
        }
        self.serve(id, now);
    }

    /// A request of a line cannot have its lock.
    pub(super) fn ask_failed(&mut self, id: Id, failure: Failure, now: Duration) {
        let first = self
            .lines
            .get(id)
            .and_then(|line| line.queue.front().copied());
        if let Some(first) = first {
            self.end(first, News::Failed(failure));
        }
        self.serve(id, now);
    }

    /// The server has released a hold, or failed.
    pub(super) fn released(&mut self, id: Id, outcome: Outcome, now: Duration) {
        if let Outcome::Failed(_) = outcome {
            let conn = self.holds.get(id).map(|hold| hold.conn);
            // Whether it is held nobody knows. The end of the session is the end of that.
            conn.into_iter().for_each(|conn| self.shut(conn, now));
            return;
        }
        let Some(hold) = self.holds.remove(id) else {
            return;
        };
        if let Some(conn) = self.conns.get_mut(hold.conn) {
            conn.holds -= 1;
        }
        if let HoldState::Releasing(Some(ticket)) = hold.state {
            self.end(ticket, News::Released);
        }
        if let Some(line) = self.lines.get_mut(hold.line) {
            line.holds.retain(|hold| *hold != id);
        }
        self.serve(hold.line, now);
    }
}
