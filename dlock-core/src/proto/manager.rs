//! Any number of locks over a few connections: decides which conversation runs on which connection, and whom to tell.

mod action;
mod config;
mod conn;
mod dialect;
mod group;
mod hold;
mod line;
mod question;
mod schedule;
mod slab;
mod timers;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub use action::{
    Action, ConnId, HoldId, How, Identity, News, Outcome, QuestionId, Ticket, Wanted,
};
pub use config::Config;
pub use dialect::{ManagedDialect, Token};

use self::action::Of;
use self::conn::{Conn, Job, State};
use self::group::Group;
use self::hold::{Hold, HoldState};
use self::line::{Line, Request};
use self::question::Question;
use self::slab::{Id, Slab};
use super::{Aftermath, Failure, Reason};

/// Owns the order of all conversations of a `LockManager`. Like a [`Machine`](super::Machine) it does no I/O and has no
/// clock, task or thread: what happens goes in, with the time (`now`, of a clock that never goes back), and what to do
/// comes out of [`poll`](Self::poll).
///
/// # Lines
///
/// Each lock has a line of the requests of this process, first come, first served. The line asks the server for its
/// first request only.
///
/// | the line | and | then |
/// |---|---|---|
/// | has no hold | somebody wants one | it is `Ready`: asks when a connection is free |
/// | `Ready` | a connection is free that holds nothing, and one more may wait | asks and waits there |
/// | `Ready` | another connection is free | tries there |
/// | has tried, taken | the first request only tries | that request ends |
/// | | otherwise | it is `Parked`: waits on a connection that holds nothing, or tries again after a pause |
/// | has asked, granted | the grant is old | the session is asked whether it is still there, first |
/// | | nobody wants it any more | releases it |
/// | has a hold that nobody uses | the next request wants the same, and the hold has turns left | that request has it |
/// | | otherwise | releases it, and asks again behind the others in the server's queue |
/// | has a shared hold | the next request is a reader, and the hold has turns left | both share it |
/// | | the turns are used up | asks on another connection, and the readers move there: a waiting writer comes first |
///
/// # Connections
///
/// Each runs one conversation at a time. Held locks share connections. A wait has a connection of its own that holds
/// nothing, and one connection never waits, so that releases, tries and the lease go on.
///
/// # Lease
///
/// A session that holds something is asked whether it is there, several times in a lease. Its holds are lost when no
/// answer comes: counted from when the last answered statement was sent, and earlier than the server's own limit.
#[derive(Debug)]
pub struct Manager {
    config: Config,
    lines: Slab<Line>,
    identities: HashMap<Identity, Id>,
    requests: Slab<Request>,
    groups: Slab<Group>,
    /// What the requests of a group have come to.
    group_news: VecDeque<(Id, Id, News)>,
    holds: Slab<Hold>,
    conns: Slab<Conn>,
    questions: Slab<Question>,
    /// To a connection that may have had its turn already.
    questions_moved: bool,
    /// The limits of requests.
    limits: BTreeSet<(Duration, Id)>,
    /// Lines that ask as soon as a connection is free.
    ready: VecDeque<Id>,
    /// Lines whose lock is taken, by their order.
    parked: BTreeMap<u64, Id>,
    /// When those are tried again.
    polls: BTreeSet<(Duration, Id)>,
    next_order: u64,
    /// No connection is opened before.
    open_after: Duration,
    open_failures: u32,
    /// A connection is missing, but it is too early to open one.
    wants_to_open: bool,
    closing: Option<Closing>,
    actions: VecDeque<Action>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    Begun,
    Told,
}

impl Manager {
    /// A manager that has no connections yet.
    ///
    /// # Panics
    ///
    /// Without any connection.
    pub fn new(config: Config) -> Self {
        assert!(config.connections > 0, "a manager needs a connection");
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
    pub fn open_failed(&mut self, ConnId(id): ConnId, failure: Failure, now: Duration) {
        self.expire_leases(now);
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
            .is_some_and(|conn| !conn.worked && conn.state != State::Closing)
        {
            self.back_off(now);
        }
        self.lose(id, &failure, now);
        self.conns.remove(id);
        self.schedule(now);
    }

    /// A connection is closed, as [`Action::Close`] asked for.
    pub fn closed(&mut self, ConnId(id): ConnId, now: Duration) {
        if self
            .conns
            .get(id)
            .is_some_and(|conn| conn.state == State::Closing)
        {
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
