use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use super::action::{Action, Identity, News};
use super::config::Config;
use super::conn::Conn;
use super::group::Group;
use super::hold::Hold;
use super::line::{Line, Request};
use super::question::Question;
use super::slab::{Id, Slab};

/// Owns the order of all conversations of a `LockManager`. Like a [`Machine`](crate::proto::Machine) it does no I/O and
/// has no clock, task or thread: what happens goes in, with the time (`now`, of a clock that never goes back), and what
/// to do comes out of [`poll`](Self::poll).
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
    pub(super) config: Config,
    pub(super) lines: Slab<Line>,
    pub(super) identities: HashMap<Identity, Id>,
    pub(super) requests: Slab<Request>,
    pub(super) groups: Slab<Group>,
    /// What the requests of a group have come to.
    pub(super) group_news: VecDeque<(Id, Id, News)>,
    pub(super) holds: Slab<Hold>,
    pub(super) conns: Slab<Conn>,
    pub(super) questions: Slab<Question>,
    /// To a connection that may have had its turn already.
    pub(super) questions_moved: bool,
    /// The limits of requests.
    pub(super) limits: BTreeSet<(Duration, Id)>,
    /// Lines that ask as soon as a connection is free.
    pub(super) ready: VecDeque<Id>,
    /// Lines whose lock is taken, by their order.
    pub(super) parked: BTreeMap<u64, Id>,
    /// When those are tried again.
    pub(super) polls: BTreeSet<(Duration, Id)>,
    pub(super) next_order: u64,
    /// No connection is opened before.
    pub(super) open_after: Duration,
    pub(super) open_failures: u32,
    /// A connection is missing, but it is too early to open one.
    pub(super) wants_to_open: bool,
    pub(super) closing: Option<Closing>,
    pub(super) actions: VecDeque<Action>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    Begun,
    Told,
}
