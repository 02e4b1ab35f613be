use std::sync::Arc;
use std::time::Duration;

use super::action::{Action, Identity, News, Of, Ticket, Wanted};
use super::config::Config;
use super::group::{Group, Lock, State};
use super::slab::Id;
use super::state::Manager;
use crate::proto::{Cause, Failure};

impl Manager {
    /// Somebody wants several locks as one, which are in the order of everybody. Otherwise it is as
    /// [`request`](Self::request).
    ///
    /// # Panics
    ///
    /// Without any lock.
    pub fn request_all(
        &mut self,
        locks: Vec<(Identity, Arc<Wanted>)>,
        limit: Option<Duration>,
        now: Duration,
    ) -> Ticket {
        self.expire_leases(now);
        assert!(!locks.is_empty(), "several locks are at least one");
        let id = self.groups.insert(Group {
            locks: Lock::merged(locks),
            held: Vec::new(),
            state: State::Held,
            tries: limit == Some(Duration::ZERO),
            until: limit.map(|limit| now.saturating_add(limit)),
            since: now,
            told: false,
            losses: 0,
        });
        self.ask_for_next(id, now);
        self.schedule(now);
        Ticket(Of::Several(id))
    }

    /// The requests of a ticket that have their lock.
    pub(super) fn members_of(&self, Ticket(of): Ticket) -> Vec<Id> {
        match of {
            Of::One(id) => vec![id],
            Of::Several(id) => self
                .groups
                .get(id)
                .map_or(Vec::new(), |group| group.held.clone()),
        }
    }

    /// The news of a request that answers at once are heard later, when the group knows the request.
    fn ask_for_next(&mut self, id: Id, now: Duration) {
        let Some(group) = self.groups.get(id) else {
            return;
        };
        let Lock { identity, what, .. } = group.locks[group.held.len()].clone();
        let limit = match group.tries {
            true => Some(Duration::ZERO),
            false => group.until.map(|until| until.saturating_sub(now)),
        };
        let request = self.begin(identity, what, limit, Some(id), now);
        if let Some(group) = self.groups.get_mut(id) {
            group.state = State::Acquires(request);
        }
    }

    /// Hears what the requests of groups have come to.
    pub(super) fn hear_of_groups(&mut self, now: Duration) {
        while let Some((group, member, news)) = self.group_news.pop_front() {
            self.heard(group, member, news, now);
        }
    }

    fn heard(&mut self, id: Id, member: Id, news: News, now: Duration) {
        let Some(group) = self.groups.get_mut(id) else {
            return;
        };
        let name = group.name(member);
        let is_held = group.held.contains(&member);
        match (&mut group.state, news) {
            (State::Acquires(asked), News::Granted { .. }) if *asked == member => {
                group.held.push(member);
                if group.held.len() < group.locks.len() {
                    return self.ask_for_next(id, now);
                }
                group.state = State::Held;
                let granted = News::Granted { slot: None };
                let tell = Action::Tell(Ticket(Of::Several(id)), granted);
                self.actions.push_back(tell);
            }
            (State::Acquires(asked), News::Taken { holders, .. }) if *asked == member => {
                let waited = now.saturating_sub(group.since);
                let about = Some(name);
                let taken = News::Taken {
                    waited,
                    holders,
                    about,
                };
                self.end_group(id, taken, now);
            }
            (State::Acquires(asked), News::Failed(failure)) if *asked == member => {
                self.end_group(id, News::Failed(failure.about(&name)), now);
            }
            (State::Acquires(asked), News::Closed) if *asked == member => {
                self.end_group(id, News::Closed, now);
            }
            (State::Acquires(_), News::Lost) if is_held => {
                group.losses += 1;
                if group.losses >= Config::LOSSES {
                    let failure = Failure::lost(Cause::default()).about(&name);
                    return self.end_group(id, News::Failed(failure), now);
                }
                self.give_up_members(id, now);
                self.ask_for_next(id, now);
            }
            (State::Held, News::Lost) if is_held => self.end_group(id, News::Lost, now),
            (State::Releases(failed), news) if is_held => {
                if let News::NotReleased(failure) = news {
                    failed.get_or_insert_with(|| failure.about(&name));
                }
                let failed = failed.take();
                // The names of the others stay what they are, in the order of `locks`.
                let at = group.held.iter().position(|held| *held == member);
                if let Some(at) = at {
                    group.held.remove(at);
                    group.locks.remove(at);
                }
                group.state = State::Releases(failed.clone());
                if group.held.is_empty() {
                    let news = failed.map_or(News::Released, News::NotReleased);
                    self.end_group(id, news, now);
                }
            }
            // Of a request that was given up.
            _ => {}
        }
    }

    fn end_group(&mut self, id: Id, news: News, now: Duration) {
        // It is told before anybody else is granted what it gives back.
        let tell = Action::Tell(Ticket(Of::Several(id)), news);
        self.actions.push_back(tell);
        self.give_up_group(id, now);
    }

    /// Nobody wants to hear of a group any more.
    pub(super) fn give_up_group(&mut self, id: Id, now: Duration) {
        self.give_up_members(id, now);
        self.groups.remove(id);
    }

    /// Gives back all that it has, and no longer asks.
    fn give_up_members(&mut self, id: Id, now: Duration) {
        let Some(group) = self.groups.get_mut(id) else {
            return;
        };
        let mut members = std::mem::take(&mut group.held);
        if let State::Acquires(asked) = group.state {
            members.push(asked);
        }
        for member in members {
            self.give_up(member, now);
        }
    }

    /// The holder gives all back. `false`: it has lost one of them, and that was told.
    pub(super) fn release_group(&mut self, id: Id, now: Duration) -> bool {
        // What was lost in this moment comes first.
        self.hear_of_groups(now);
        let Some(group) = self.groups.get_mut(id) else {
            return false;
        };
        if !matches!(group.state, State::Held) {
            return false;
        }
        group.state = State::Releases(None);
        for member in group.held.clone() {
            self.give_back(member, true, now);
        }
        true
    }
}
