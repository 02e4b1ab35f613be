use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::action::{Action, Identity, News, Of, Ticket, Wanted};
use super::config::Config;
use super::conn::{Job, State};
use super::hold::Hold;
use super::line::{Asking, Line, Request};
use super::slab::Id;
use super::state::Manager;
use crate::Holder;

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
                    silent: false,
                    unwanted: None,
                })
            })
    }

    /// A request for a lock, of a group or of its own.
    pub(super) fn begin(
        &mut self,
        identity: Identity,
        what: Arc<Wanted>,
        limit: Option<Duration>,
        group: Option<Id>,
        now: Duration,
    ) -> Id {
        let line = self.line(identity);
        let tries = limit == Some(Duration::ZERO);
        // A try does not wait long for the answer to somebody of this process who leaves the queue or the lock.
        let behind = self.is_busy(line, &what);
        let limit = match tries {
            true => behind.then_some(Config::GRACE),
            false => limit,
        };
        let until = limit.map(|limit| now.saturating_add(limit));
        let mut request = Request::new(line, what, tries, until, group, now);
        let group = group.and_then(|group| self.groups.get(group));
        if let Some(group) = group {
            request.told = group.told;
            request.more = Arc::clone(&group.locks[group.held.len()].more);
        }
        let id = self.requests.insert(request);
        if self.closing.is_some() {
            self.end(id, News::Closed);
        } else if tries && self.is_taken_here(id) {
            self.taken(id, Vec::new(), now);
        } else {
            if let Some(until) = until {
                self.limits.insert((until, id));
            }
            if let Some(line) = self.lines.get_mut(line) {
                line.queue.push_back(id);
            }
        }
        self.serve(line, now);
        id
    }

    /// Nobody wants to hear of a request any more, or of what it was granted.
    pub(super) fn give_up(&mut self, id: Id, now: Duration) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let line = request.line;
        match request.hold {
            Some(_) => self.give_back(id, false, now),
            None => {
                self.leave(id);
                self.serve(line, now);
            }
        }
    }

    pub(super) fn has_hold(&self, id: Id) -> bool {
        let request = self.requests.get(id);
        request.is_some_and(|request| request.hold.is_some())
    }

    /// The news go to whoever wants the lock, or to the group.
    fn tell(&mut self, id: Id, group: Option<Id>, news: News) {
        match group {
            None => {
                let tell = Action::Tell(Ticket(Of::One(id)), news);
                self.actions.push_back(tell);
            }
            Some(group) => self.group_news.push_back((group, id, news)),
        }
    }

    /// Tells that a request has its lock.
    pub(super) fn tell_granted(&mut self, id: Id, slot: Option<u32>) {
        let group = self.requests.get(id).and_then(|request| request.group);
        self.tell(id, group, News::Granted { slot });
    }

    /// Ends a request.
    pub(super) fn end(&mut self, id: Id, news: News) {
        let group = self.requests.get(id).and_then(|request| request.group);
        self.leave(id);
        self.tell(id, group, news);
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
            let about = None;
            let taken = News::Taken {
                waited,
                holders,
                about,
            };
            self.end(id, taken);
        }
    }

    /// A request that goes on waiting hears who has the lock.
    pub(super) fn tell_holders(&mut self, id: Id, holders: &Arc<[Holder]>) {
        if let Some(request) = self.requests.get_mut(id).filter(|request| !request.told) {
            request.told = true;
            if let Some(line) = self.lines.get_mut(request.line) {
                line.silent = false;
            }
            let ticket = Ticket(request.group.map_or(Of::One(id), Of::Several));
            if let Some(group) = request.group.and_then(|group| self.groups.get_mut(group)) {
                group.told = true;
            }
            let tell = Action::TellHolders(ticket, Arc::clone(holders));
            self.actions.push_back(tell);
        }
    }

    /// Whether this process holds the lock or asks for it, so that a request comes behind that.
    pub(super) fn is_busy(&self, id: Id, what: &Wanted) -> bool {
        self.lines.get(id).is_some_and(|line| match what.permits {
            None => !line.holds.is_empty() || matches!(line.asking, Asking::Now { .. }),
            Some(permits) => {
                let waits = matches!(line.asking, Asking::Now { waits: true, .. });
                waits || self.slots_of(line, permits).count() >= permits as usize
            }
        })
    }

    /// What a line has of the slots of a semaphore with so many.
    fn slots_of<'m>(&'m self, line: &'m Line, permits: u32) -> impl Iterator<Item = &'m Hold> {
        let holds = line.holds.iter().filter_map(|hold| self.holds.get(*hold));
        holds.filter(move |hold| hold.slot.is_some_and(|slot| slot < permits))
    }

    /// Whether nobody need ask the server for this try.
    pub(super) fn is_taken_here(&self, id: Id) -> bool {
        let Some(request) = self.requests.get(id) else {
            return false;
        };
        let Some(line) = self.lines.get(request.line) else {
            return false;
        };
        if let Some(permits) = request.what.permits {
            let used = self.slots_of(line, permits);
            let used = used.filter(|hold| !hold.tickets.is_empty()).count();
            let mut others = line.queue.iter().filter_map(|id| self.requests.get(*id));
            return used >= permits as usize || others.any(|other| !other.tries);
        }
        let mut holds = line.holds.iter().filter_map(|hold| self.holds.get(*hold));
        !line.queue.is_empty()
            || holds.any(|hold| {
                let shares = hold.is_shared() && *hold.what == *request.what;
                !hold.tickets.is_empty() && !shares
            })
    }

    /// Does what can be done for a line: serves its requests, releases what nobody uses, and wants to ask the server.
    pub(super) fn serve(&mut self, id: Id, now: Duration) {
        while let Some((first, hold)) = self.first_served(id, now) {
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

    /// The first request of a line, and what it can have now.
    fn first_served(&self, id: Id, now: Duration) -> Option<(Id, Id)> {
        let line = self.lines.get(id)?;
        let first = *line.queue.front()?;
        let request = self.requests.get(first)?;
        // Readers have moved to the last one.
        let holds = match line.is_semaphore() {
            true => &line.holds[..],
            false => line.holds.last().map_or(&[][..], std::slice::from_ref),
        };
        let mut holds = holds.iter().copied();
        let hold = holds.find(|hold| {
            let hold = self.holds.get(*hold);
            hold.is_some_and(|hold| hold.serves(request, &self.config, now))
        })?;
        Some((first, hold))
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

    /// A line with a shared hold asks for another one when the turns of the first are used up. That of a semaphore asks
    /// until it has all slots.
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
        if let Some(permits) = first.what.permits {
            return self.slots_of(line, permits).count() < permits as usize;
        }
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
