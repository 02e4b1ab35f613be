use std::sync::Arc;
use std::time::Duration;

use super::action::{Action, ConnId, HoldId, How};
use super::config::Config;
use super::conn::{Conn, Job, State};
use super::hold::Hold;
use super::line::Asking;
use super::question::Errand;
use super::slab::Id;
use super::state::Manager;
use crate::Holder;

/// Where a line may ask.
#[derive(Clone, Copy, Debug)]
enum Place {
    Conn(Id),
    /// A connection has to be opened first.
    Open,
    /// One is on its way, or will be free. `others` may ask sooner: where this line holds the lock already.
    Later {
        others: bool,
    },
    /// Not until somebody else stops waiting.
    Never,
}

impl Manager {
    /// Gives every free connection something to do. The last step of each call.
    pub(super) fn schedule(&mut self, now: Duration) {
        loop {
            self.hear_of_groups(now);
            self.give_work(now);
            if self.group_news.is_empty() {
                return;
            }
        }
    }

    fn give_work(&mut self, now: Duration) {
        self.wants_to_open = false;
        if self.closing.is_some() {
            return self.finish_closing();
        }
        for id in self.conns.ids() {
            self.tend(id, now);
        }
        if std::mem::take(&mut self.questions_moved) {
            for id in self.conns.ids() {
                self.tend(id, now);
            }
        }
        // Those in front of it come first: it takes no connection that they could have.
        let mut at = 0;
        while let Some(&line) = self.ready.get(at) {
            match self.place_to_try(line) {
                Place::Conn(conn) => {
                    self.ready.remove(at);
                    self.ask(line, conn, false, now);
                }
                Place::Open if self.open(now) => {}
                Place::Never => {
                    self.ready.remove(at);
                    self.share(line, now);
                    at = 0;
                }
                Place::Later { others: true } => at += 1,
                Place::Open | Place::Later { .. } => break,
            }
        }
        while let Some((&order, &line)) = self.parked.first_key_value() {
            match self.place_to_wait() {
                Place::Conn(conn) => {
                    self.parked.remove(&order);
                    self.ask(line, conn, true, now);
                }
                Place::Open if self.open(now) => {}
                _ => break,
            }
        }
    }

    /// Asks whether the session is there, releases what is to be released, and draws tokens.
    fn tend(&mut self, id: Id, now: Duration) {
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        if conn.state != State::Idle {
            return;
        }
        if conn.unconfirmed || conn.asked_at(&self.config).is_some_and(|at| at <= now) {
            conn.state = State::Busy(Job::KeepAlive);
            self.actions.push_back(Action::KeepAlive(ConnId(id)));
            return;
        }
        while let Some(errand) = self
            .conns
            .get_mut(id)
            .and_then(|conn| conn.errands.pop_front())
        {
            let (job, action) = match errand {
                Errand::Release(hold) => {
                    let (conn, hold) = (ConnId(id), HoldId(hold));
                    (Job::Release(hold.0), Action::Release { conn, hold })
                }
                Errand::DrawToken(question) => match self.hold_to_draw_for(question, id) {
                    Some(hold) => {
                        let (conn, hold) = (ConnId(id), HoldId(hold));
                        (Job::DrawToken(question), Action::DrawToken { conn, hold })
                    }
                    None => continue,
                },
            };
            if let Some(conn) = self.conns.get_mut(id) {
                conn.state = State::Busy(job);
            }
            self.actions.push_back(action);
            return;
        }
    }

    /// Opens a connection, unless it is too early.
    fn open(&mut self, now: Duration) -> bool {
        if now < self.open_after {
            self.wants_to_open = true;
            return false;
        }
        let id = self.conns.insert(Conn::opening(now));
        self.actions.push_back(Action::Open(ConnId(id)));
        true
    }

    /// The connection with the most holds, so that others stay free for waits. Never one that holds the lock already:
    /// the server would grant it once more, whoever waits. (The slots of a semaphore are told apart.)
    fn place_to_try(&self, line: Id) -> Place {
        let mut best: Option<(usize, Id)> = None;
        let mut empty = None;
        let (mut coming, mut others) = (false, false);
        let mut working = 0;
        let can_open = self.conns.len() < self.config.connections;
        for (id, conn) in self.conns.iter() {
            if self.holds_on(line, id) {
                others |= conn.state == State::Idle;
                continue;
            }
            match conn.state {
                State::Idle if conn.holds > 0 => best = best.max(Some((conn.holds, id))),
                State::Idle => empty = Some(id),
                State::Opening { .. } => coming = true,
                // A new one takes its place.
                State::Closing { .. } if !can_open => coming = true,
                _ => {}
            }
            if conn.holds > 0 || matches!(conn.state, State::Busy(_)) && !conn.waits() {
                working += 1;
            }
        }
        match (best, empty) {
            (Some((_, id)), _) => Place::Conn(id),
            (None, Some(id)) if working < self.config.working() => Place::Conn(id),
            _ if coming => Place::Later { others },
            _ if can_open && working < self.config.working() => Place::Open,
            _ if working > 0 => Place::Later { others },
            _ => Place::Never,
        }
    }

    fn holds_on(&self, line: Id, conn: Id) -> bool {
        let line = self.lines.get(line).filter(|line| !line.is_semaphore());
        let holds = line.map(|line| &line.holds[..]).unwrap_or_default();
        let mut holds = holds.iter().filter_map(|hold| self.holds.get(*hold));
        holds.any(|hold| hold.conn == conn)
    }

    /// A connection that holds nothing, if enough others do not wait.
    fn place_to_wait(&self) -> Place {
        if !self.may_wait() {
            return Place::Never;
        }
        let mut conns = self.conns.iter();
        let empty = conns.find(|(_, conn)| conn.state == State::Idle && conn.holds == 0);
        let mut conns = self.conns.iter();
        let opening = conns.any(|(_, conn)| matches!(conn.state, State::Opening { .. }));
        match empty {
            Some((id, _)) => Place::Conn(id),
            None if !opening && self.conns.len() < self.config.connections => Place::Open,
            None => Place::Never,
        }
    }

    fn may_wait(&self) -> bool {
        let waiting = self.conns.iter().filter(|(_, conn)| conn.waits()).count();
        waiting < self.config.waiting()
    }

    /// Asks the server for a line's lock.
    fn ask(&mut self, id: Id, conn_id: Id, parked: bool, now: Duration) {
        let may_wait = self.may_wait();
        let Some(line) = self.lines.get_mut(id) else {
            return;
        };
        let Some(first) = line
            .queue
            .front()
            .and_then(|first| self.requests.get(*first))
        else {
            return;
        };
        let Some(conn) = self.conns.get_mut(conn_id) else {
            return;
        };
        let waits = !first.tries && conn.holds == 0 && may_wait;
        debug_assert!(waits || !parked, "BUG: a line is parked because it waits");
        if let Asking::Parked { at, .. } = line.asking {
            self.polls.remove(&(at, id));
        }
        let queue = line.queue.iter().filter_map(|id| self.requests.get(*id));
        let untold = queue.clone().any(|request| !request.told);
        let until = queue
            .map(|request| request.until.filter(|_| !request.tries))
            .try_fold(Duration::ZERO, |longest, until| Some(longest.max(until?)));
        // At least a millisecond: zero would be a try.
        let rest = until.map(|until| until.saturating_sub(now).max(Duration::from_millis(1)));
        let first_wait = self.config.first_wait(first.what.permits).filter(|first| {
            let is_long = rest.is_none_or(|rest| rest >= 2 * *first);
            waits && is_long && untold && !line.silent
        });
        let tells = first_wait.is_some();
        let (limit, until) = match self.config.longest_wait {
            _ if !waits => (Some(Duration::ZERO), None),
            _ if tells => (first_wait, None),
            Some(longest) if rest.is_none_or(|rest| rest > longest) => (Some(longest), None),
            _ => (rest, until),
        };
        line.silent |= tells;
        line.asking = Asking::Now { until, waits };
        let held = line.holds.iter().filter_map(|hold| self.holds.get(*hold));
        let on_it = held.filter(|hold| hold.conn == conn_id);
        let except = on_it.filter_map(|hold| hold.slot).collect();
        let (what, more) = (Arc::clone(&first.what), first.more.to_vec());
        let hold = self.holds.insert(Hold::asked(id, conn_id, first));
        conn.state = State::Busy(Job::Acquire {
            hold,
            waits: waits.then_some(now),
        });
        self.actions.push_back(Action::Acquire {
            conn: ConnId(conn_id),
            hold: HoldId(hold),
            what,
            how: How {
                limit,
                name_holders: tells || until.is_some(),
                except,
                more,
            },
        });
    }

    /// Readers share a hold that has no turns left, because there is no connection to ask for another one.
    fn share(&mut self, id: Id, now: Duration) {
        let Some(line) = self.lines.get_mut(id) else {
            return;
        };
        line.asking = Asking::No;
        let (first, hold) = (line.queue.front().copied(), line.holds.last().copied());
        if let (Some(first), Some(hold)) = (first, hold) {
            self.grant(first, hold);
            self.serve(id, now);
        } else {
            debug_assert!(false, "BUG: no connection is left to try on");
        }
    }

    /// Another session has the lock.
    pub(super) fn ask_taken(
        &mut self,
        id: Id,
        until: Option<Duration>,
        holders: Vec<Holder>,
        now: Duration,
    ) {
        let holders: Arc<[Holder]> = holders.into();
        let Some(line) = self.lines.get(id) else {
            return;
        };
        // The server's answer may come a little early.
        let passed = until.unwrap_or(Duration::ZERO).max(now);
        let queue: Vec<_> = line.queue.iter().copied().collect();
        let somebody = holders.iter().any(|holder| holder.granted);
        let mut in_front = true;
        for ticket in queue {
            let Some(request) = self.requests.get(ticket) else {
                continue;
            };
            in_front &= request.tries;
            if in_front || request.until.is_some_and(|until| until <= passed) {
                self.taken(ticket, holders.to_vec(), now);
            } else if self.config.tells_after.is_some() && somebody {
                self.tell_holders(ticket, &holders);
            }
        }
        self.park(id, now);
    }

    fn park(&mut self, id: Id, now: Duration) {
        let wants = self
            .lines
            .get(id)
            .is_some_and(|line| !line.queue.is_empty());
        let Some(line) = self.lines.get_mut(id).filter(|_| wants) else {
            return;
        };
        let pause = line.pause.map_or(Config::FIRST_POLL, |pause| {
            (2 * pause).min(Config::LAST_POLL)
        });
        line.pause = Some(pause);
        let order = *line.order.get_or_insert_with(|| {
            self.next_order += 1;
            self.next_order
        });
        line.asking = Asking::Parked { at: now + pause };
        self.parked.insert(order, id);
        self.polls.insert((now + pause, id));
    }

    /// A parked line tries once more.
    pub(super) fn unpark(&mut self, id: Id) {
        self.stop_asking(id);
        if let Some(line) = self.lines.get_mut(id) {
            line.asking = Asking::Ready;
            self.ready.push_back(id);
        }
    }

    pub(super) fn stop_asking(&mut self, id: Id) {
        let Some(line) = self.lines.get_mut(id) else {
            return;
        };
        match std::mem::replace(&mut line.asking, Asking::No) {
            Asking::Ready => self.ready.retain(|ready| *ready != id),
            Asking::Parked { at } => {
                self.polls.remove(&(at, id));
                line.order.iter().for_each(|order| {
                    self.parked.remove(order);
                });
            }
            Asking::No | Asking::Now { .. } => {}
        }
    }
}
