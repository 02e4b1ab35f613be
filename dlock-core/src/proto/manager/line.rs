use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::conn::{Job, State};
use super::slab::Id;
use super::{Action, Config, Identity, Manager, News, Ticket, Wanted};
use crate::Holder;

/// All requests of this process for one lock.
#[derive(Debug)]
pub(super) struct Line {
    identity: Identity,
    /// Those who wait.
    pub(super) queue: VecDeque<Id>,
    /// What the server has granted. More than one only while readers move from one to the next.
    pub(super) holds: Vec<Id>,
    pub(super) asking: Asking,
    /// Its place among the lines that wait for a connection to wait on.
    pub(super) order: Option<u64>,
    /// How many connections were lost in a row while asking.
    pub(super) losses: u32,
    /// The last pause between two tries.
    pub(super) pause: Option<Duration>,
    /// Since when the server is asked in vain: nobody in this process wants the lock any more.
    unwanted: Option<Duration>,
}

impl Line {
    /// Whether it holds something, or the server is asked.
    pub(super) fn is_busy(&self) -> bool {
        !self.holds.is_empty() || matches!(self.asking, Asking::Now { .. })
    }
}

/// Whether the server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    No,
    /// As soon as a connection is free.
    Ready,
    /// Now. `until` is when the server gives up, if a limit of a request makes it.
    Now {
        until: Option<Duration>,
    },
    /// It is taken. Tried again at `at`.
    Parked {
        at: Duration,
    },
}

/// Somebody who waits or holds.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) line: Id,
    pub(super) what: Arc<Wanted>,
    pub(super) tries: bool,
    /// When its limit passes.
    pub(super) until: Option<Duration>,
    since: Duration,
    /// What it was granted.
    pub(super) hold: Option<Id>,
    /// Its limit has passed, but the server's answer is on its way.
    pub(super) grace: bool,
}

impl Request {
    pub(super) fn new(
        line: Id,
        what: Arc<Wanted>,
        tries: bool,
        until: Option<Duration>,
        now: Duration,
    ) -> Self {
        Self {
            line,
            what,
            tries,
            until,
            since: now,
            hold: None,
            grace: false,
        }
    }
}

impl Manager {
    /// The line of a lock.
    pub(super) fn line(&mut self, identity: Identity) -> Id {
        *self
            .identities
            .entry(identity)
            .or_insert_with_key(|identity| {
                self.lines.insert(Line {
                    identity: identity.clone(),
                    queue: VecDeque::new(),
                    holds: Vec::new(),
                    asking: Asking::No,
                    order: None,
                    losses: 0,
                    pause: None,
                    unwanted: None,
                })
            })
    }

    pub(super) fn tell(&mut self, id: Id, news: News) {
        self.actions.push_back(Action::Tell(Ticket(id), news));
    }

    /// Ends a request.
    pub(super) fn end(&mut self, id: Id, news: News) {
        self.leave(id);
        self.tell(id, news);
    }

    /// Removes a request from wherever it waits.
    pub(super) fn leave(&mut self, id: Id) {
        let Some(request) = self.requests.remove(id) else {
            return;
        };
        if let Some(until) = request.until {
            self.limits.remove(&(until, id));
        }
        if request.hold.is_none() {
            if let Some(line) = self.lines.get_mut(request.line) {
                line.queue.retain(|waiting| *waiting != id);
            }
        }
    }

    /// The end of a request whose limit has passed.
    pub(super) fn taken(&mut self, id: Id, holders: Vec<Holder>, now: Duration) {
        if let Some(request) = self.requests.get(id) {
            let waited = now.saturating_sub(request.since);
            self.end(id, News::Taken { waited, holders });
        }
    }

    /// Whether nobody need ask the server for this try.
    pub(super) fn is_taken_here(&self, id: Id) -> bool {
        let Some(request) = self.requests.get(id) else {
            return false;
        };
        let Some(line) = self.lines.get(request.line) else {
            return false;
        };
        let mut holds = line.holds.iter().filter_map(|hold| self.holds.get(*hold));
        !line.queue.is_empty()
            || holds.any(|hold| {
                let shares = hold.is_shared() && *hold.what == *request.what;
                !hold.tickets.is_empty() && !shares
            })
    }

    /// Does what can be done for a line: serves its requests, releases what nobody uses, and wants to ask the server.
    pub(super) fn serve(&mut self, id: Id, now: Duration) {
        while let Some(line) = self.lines.get(id) {
            let (Some(&first), Some(&hold)) = (line.queue.front(), line.holds.last()) else {
                break;
            };
            let serves = match (self.holds.get(hold), self.requests.get(first)) {
                (Some(hold), Some(request)) => hold.serves(&request.what, &self.config, now),
                _ => false,
            };
            if !serves {
                break;
            }
            self.grant(first, hold);
        }
        let Some(line) = self.lines.get(id) else {
            return;
        };
        for hold in line.holds.clone() {
            self.release_unused(hold);
        }
        let wants = self.wants_to_ask(id);
        let Some(line) = self.lines.get_mut(id) else {
            return;
        };
        let vain = line.queue.is_empty() && matches!(line.asking, Asking::Now { .. });
        line.unwanted = vain.then(|| line.unwanted.unwrap_or(now));
        match (wants, line.asking) {
            (true, Asking::No) => {
                line.asking = Asking::Ready;
                self.ready.push_back(id);
            }
            (false, Asking::Ready | Asking::Parked { .. }) => self.stop_asking(id),
            _ => {}
        }
        self.remove_if_empty(id);
    }

    fn remove_if_empty(&mut self, id: Id) {
        let empty = self.lines.get(id).is_some_and(|line| {
            line.queue.is_empty() && line.holds.is_empty() && line.asking == Asking::No
        });
        if empty {
            if let Some(line) = self.lines.remove(id) {
                self.identities.remove(&line.identity);
            }
        }
    }

    /// A line with a shared hold asks for another one when the turns of the first are used up.
    fn wants_to_ask(&self, id: Id) -> bool {
        let Some(line) = self.lines.get(id) else {
            return false;
        };
        let Some(first) = line
            .queue
            .front()
            .and_then(|first| self.requests.get(*first))
        else {
            return false;
        };
        let mut holds = line.holds.iter().filter_map(|hold| self.holds.get(*hold));
        holds.all(|hold| hold.is_shared() && *hold.what == *first.what)
    }

    /// When a wait ends that nobody in this process wants any more.
    pub(super) fn unwanted_at(&self, state: State) -> Option<Duration> {
        let State::Busy(Job::Acquire {
            hold,
            waits: Some(_),
        }) = state
        else {
            return None;
        };
        let line = self.lines.get(self.holds.get(hold)?.line)?;
        line.unwanted.map(|since| since + Config::LINGER)
    }
}
