use std::time::Duration;

/// The limits of a [`Manager`](super::Manager).
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// At most so many connections are open at once.
    pub connections: usize,
    /// After so long without a statement the server ends a session. `None` where it never does, and a hold cannot get
    /// lost while the process runs (SQLite). At most [`LONGEST_LEASE`](Self::LONGEST_LEASE): a longer one is cut.
    pub lease: Option<Duration>,
    /// The longest wait that one conversation may ask for. `None`: the conversation itself comes back now and then.
    pub longest_wait: Option<Duration>,
    /// A hold serves so many requests of this process before the server's queue has its turn.
    pub turns: u32,
    /// After so long it serves no further request.
    pub turn: Duration,
    /// Requests that wait are told who has the lock after so long, if they may wait twice as long.
    pub tells_after: Option<Duration>,
}

impl Config {
    /// The longest idle limit of PostgreSQL is 24.8 days in milliseconds. A holder has to hear of a loss before that.
    pub const LONGEST_LEASE: Duration = Duration::from_secs(24 * 24 * 60 * 60);

    /// How many requests one hold serves.
    pub const TURNS: u32 = 64;

    /// How long a hold serves further requests.
    pub const TURN: Duration = Duration::from_millis(100);

    /// A lock that is taken, while no connection is left to wait on, is tried again after this long at first.
    pub(super) const FIRST_POLL: Duration = Duration::from_millis(25);

    /// The pause doubles up to this.
    pub(super) const LAST_POLL: Duration = Duration::from_secs(1);

    /// The first pause after a connection could not be opened. It doubles.
    pub(super) const FIRST_BACKOFF: Duration = Duration::from_millis(50);

    /// The pause doubles up to this.
    pub(super) const LAST_BACKOFF: Duration = Duration::from_secs(5);

    /// So long a wait goes on that nobody in this process wants any more. The next request may be for the same lock,
    /// and to leave a server's queue in the middle of a wait costs the connection.
    pub(super) const LINGER: Duration = Duration::from_secs(2);

    /// A request whose limit passes while the server waits for it: the server's answer, which names the holders, may
    /// take so long.
    pub(super) const GRACE: Duration = Duration::from_millis(250);

    /// A conversation that lost its connection so many times in a row fails. Other losses are not reported to those
    /// who wait.
    pub(super) const LOSSES: u32 = 3;

    /// How long after a statement was sent, if it was answered, nobody else can have what the session holds. A tenth
    /// of the lease is for clocks that do not run at the same rate, and for timers that are late.
    pub(super) fn certain(&self) -> Option<Duration> {
        self.lease.map(|lease| lease - lease / 10)
    }

    /// How long a session that holds something stays without a statement. It is short, because the question is also
    /// how a session is noticed that was ended.
    pub(super) fn beat(&self) -> Option<Duration> {
        const LONGEST: Duration = Duration::from_millis(750);
        self.lease.map(|lease| (lease / 4).min(LONGEST))
    }

    /// A grant that was asked for longer ago is confirmed before anybody hears of it: the session's limit has counted
    /// from the grant on, and the client's clock can only count from the statement on.
    pub(super) fn stale(&self) -> Duration {
        self.lease.map_or(Duration::MAX, |lease| lease / 4)
    }

    /// A connection that nobody needs is closed after this long.
    pub(super) fn unused(&self) -> Duration {
        const WITHOUT_LEASE: Duration = Duration::from_secs(15);
        self.lease.map_or(WITHOUT_LEASE, |lease| lease / 2)
    }

    /// How long a wait is after which requests are told who has the lock. A conversation about a semaphore tries first.
    pub(super) fn first_wait(&self, permits: Option<u32>) -> Option<Duration> {
        const TRY: Duration = Duration::from_millis(100);
        let try_first = permits.map_or(Duration::ZERO, |_| TRY);
        self.tells_after.map(|after| after + try_first)
    }

    /// How long a statement may stay without an answer on a session that holds nothing. `waiting` is how long its
    /// conversation had waited when the statement was sent: servers' waits take at most as long again, or a minute.
    pub(super) fn patience(&self, waiting: Option<Duration>) -> Option<Duration> {
        const LONGEST: Duration = Duration::from_secs(60);
        let wait = waiting.map_or(Duration::ZERO, |waiting| {
            LONGEST.min(2 * waiting + Config::LINGER)
        });
        self.lease.map(|lease| lease + wait)
    }

    /// So many connections take new locks while others have to stay free for waits.
    pub(super) fn working(&self) -> usize {
        self.connections.div_ceil(2)
    }

    /// So many connections may wait. One stays for everything else.
    pub(super) fn waiting(&self) -> usize {
        self.connections - 1
    }
}
