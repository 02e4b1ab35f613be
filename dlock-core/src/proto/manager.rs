//! Any number of locks over a few connections: decides which conversation runs on which connection, and whom to tell.

mod action;
mod config;
mod conn;
mod conns;
mod dialect;
mod group;
mod groups;
mod hold;
mod holds;
mod line;
mod lines;
mod question;
mod questions;
mod schedule;
mod slab;
mod state;
mod timers;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub use action::{
    Action, ConnId, HoldId, How, Identity, News, Outcome, QuestionId, Ticket, Wanted,
};
pub use config::Config;
pub use dialect::{ManagedDialect, Token};
pub use state::Manager;

use self::action::Of;
use self::conn::{Conn, Job, State};
use self::slab::{Id, Slab};
use self::state::Closing;
use super::{Aftermath, Failure, Reason};

impl Manager {
    /// A manager that has no connections yet.
    ///
    /// # Panics
    ///
    /// Without any connection.
    pub fn new(mut config: Config) -> Self {
        assert!(config.connections > 0, "a manager needs a connection");
        config.lease = config.lease.map(|lease| lease.min(Config::LONGEST_LEASE));
        Self {
            config,
            lines: Slab::default(),
            identities: HashMap::new(),
            requests: Slab::default(),
            groups: Slab::default(),
            group_news: VecDeque::new(),
            holds: Slab::default(),
            conns: Slab::default(),
            questions: Slab::default(),
            questions_moved: false,
            limits: BTreeSet::new(),
            ready: VecDeque::new(),
            parked: BTreeMap::new(),
            polls: BTreeSet::new(),
            next_order: 0,
            open_after: Duration::ZERO,
            open_failures: 0,
            wants_to_open: false,
            closing: None,
            actions: VecDeque::new(),
        }
    }

    /// What to do next. After each other call, until there is nothing.
    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Somebody wants a lock: [`News`] follow. With `limit` zero it is only tried.
    pub fn request(
        &mut self,
        identity: Identity,
        what: Arc<Wanted>,
        limit: Option<Duration>,
        now: Duration,
    ) -> Ticket {
        self.expire_leases(now);
        let id = self.begin(identity, what, limit, None, now);
        self.schedule(now);
        Ticket(Of::One(id))
    }

    /// Nobody wants to hear of the request any more, or of the lock that it was granted.
    pub fn cancel(&mut self, Ticket(of): Ticket, now: Duration) {
        self.expire_leases(now);
        match of {
            Of::One(id) => self.give_up(id, now),
            Of::Several(id) => self.give_up_group(id, now),
        }
        self.schedule(now);
    }

    /// The holder gives the lock back: [`News::Released`] or [`News::NotReleased`] follows. `false`: it was lost
    /// before, and that was told.
    pub fn release(&mut self, Ticket(of): Ticket, now: Duration) -> bool {
        self.expire_leases(now);
        let held = match of {
            Of::One(id) => self.has_hold(id),
            Of::Several(id) => self.release_group(id, now),
        };
        if let (Of::One(id), true) = (of, held) {
            self.give_back(id, true, now);
        }
        self.schedule(now);
        held
    }

    /// Whether the holder of this ticket still has the lock.
    pub fn is_held(&self, ticket: Ticket, now: Duration) -> bool {
        let members = self.members_of(ticket);
        !members.is_empty() && members.iter().all(|id| self.is_certain(*id, now))
    }

    fn is_certain(&self, id: Id, now: Duration) -> bool {
        let hold = self.requests.get(id).and_then(|request| request.hold);
        let conn = hold
            .and_then(|hold| self.holds.get(hold))
            .map(|hold| hold.conn);
        conn.and_then(|conn| self.conns.get(conn))
            .is_some_and(|conn| {
                conn.certain_until(&self.config)
                    .is_none_or(|until| now < until)
            })
    }

    /// The connections and the holds of what a ticket has.
    pub fn holds_of(&self, ticket: Ticket) -> Vec<(ConnId, HoldId)> {
        let holds = self.members_of(ticket).into_iter().filter_map(|id| {
            let hold = self.requests.get(id)?.hold?;
            Some((ConnId(self.holds.get(hold)?.conn), HoldId(hold)))
        });
        holds.collect()
    }

    /// A connection is open. `false`: nobody wants it any more.
    pub fn opened(&mut self, ConnId(id): ConnId, now: Duration) -> bool {
        let wanted = self.conns.get_mut(id).is_some_and(|conn| conn.opened(now));
        self.schedule(now);
        wanted
    }

    /// A connection could not be opened. Without any other, all who wait are told.
    pub fn open_failed(&mut self, ConnId(id): ConnId, mut failure: Failure, now: Duration) {
        self.expire_leases(now);
        // It has held nothing that could be lost, and what it was to be set up with was no request of anybody's.
        if matches!(failure.reason, Reason::Lost | Reason::Database) {
            failure.reason = Reason::NotOpened;
        }
        if self.conns.remove(id).is_some() {
            self.no_connection(failure, now);
        }
        self.schedule(now);
    }

    /// A statement is about to be sent.
    pub fn sent(&mut self, ConnId(id): ConnId, now: Duration) {
        if let Some(conn) = self.conns.get_mut(id) {
            conn.sent = Some(now);
        }
    }

    /// The last statement that was sent is answered.
    pub fn answered(&mut self, ConnId(id): ConnId) {
        if let Some(conn) = self.conns.get_mut(id) {
            conn.renewed = conn.sent.take().unwrap_or(conn.renewed);
        }
    }

    /// A conversation has ended.
    pub fn done(&mut self, ConnId(id): ConnId, outcome: Outcome, now: Duration) {
        self.expire_leases(now);
        let Some(conn) = self.conns.get_mut(id) else {
            return;
        };
        let State::Busy(job) = conn.state else {
            return;
        };
        if let Outcome::Failed(failure) = &outcome {
            let unfit = failure.aftermath != Aftermath::Clean || failure.reason == Reason::Lost;
            if unfit || job == Job::KeepAlive {
                return self.lost(ConnId(id), failure.clone(), now);
            }
        }
        conn.idle(now);
        self.open_failures = 0;
        match job {
            Job::Acquire { hold, waits } => self.acquired(hold, waits.is_some(), outcome, now),
            Job::Release(hold) => self.released(hold, outcome, now),
            Job::DrawToken(question) => self.drawn(question, outcome),
            Job::KeepAlive => self.alive(id, now),
        }
        self.schedule(now);
    }

    /// A connection is gone, and all that it held. `failure` says why.
    pub fn lost(&mut self, ConnId(id): ConnId, failure: Failure, now: Duration) {
        if self
            .conns
            .get(id)
            .is_some_and(|conn| matches!(conn.state, State::Opening { .. }))
        {
            return self.open_failed(ConnId(id), failure, now);
        }
        // What ends each new session is asked with a pause.
        if self
            .conns
            .get(id)
            .is_some_and(|conn| !conn.worked && !conn.is_closing())
        {
            self.back_off(now);
        }
        self.lose(id, &failure, now);
        self.conns.remove(id);
        self.schedule(now);
    }

    /// A connection is closed, as [`Action::Close`] asked for.
    pub fn closed(&mut self, ConnId(id): ConnId, now: Duration) {
        if self.conns.get(id).is_some_and(Conn::is_closing) {
            self.conns.remove(id);
        }
        self.schedule(now);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) {
        self.expire(now);
        self.schedule(now);
    }

    /// Ends everything: who waits is told, what is held is lost, and all connections are closed.
    pub fn close(&mut self, now: Duration) {
        if self.closing.is_none() {
            self.closing = Some(Closing::Begun);
            for id in self.requests.ids() {
                if self
                    .requests
                    .get(id)
                    .is_some_and(|request| request.hold.is_none())
                {
                    self.end(id, News::Closed);
                }
            }
            for id in self.lines.ids() {
                self.serve(id, now);
            }
            for id in self.conns.ids() {
                self.shut(id, now);
            }
        }
        self.schedule(now);
    }
}
