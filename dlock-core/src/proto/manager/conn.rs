use std::collections::VecDeque;
use std::time::Duration;

use super::config::Config;
use super::question::Errand;
use super::slab::Id;

/// A connection, as far as the manager knows.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) state: State,
    /// A hold was granted so long ago that the session may be gone.
    pub(super) unconfirmed: bool,
    /// How many holds it has.
    pub(super) holds: usize,
    /// What is to be done on it, in this order.
    pub(super) errands: VecDeque<Errand>,
    /// When the last answered statement was sent.
    pub(super) renewed: Duration,
    /// When the statement was sent that is not answered yet.
    pub(super) sent: Option<Duration>,
    /// Since when it has nothing to do.
    pub(super) idle_since: Duration,
    /// Whether a conversation has ended well on it.
    pub(super) worked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Opening { since: Duration },
    Idle,
    Busy(Job),
    Closing { since: Duration },
}

/// A conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Acquire {
        hold: Id,
        /// Since when it waits in the server's queue; `None` if it only tries.
        waits: Option<Duration>,
    },
    Release(Id),
    /// A question.
    DrawToken(Id),
    KeepAlive,
}

impl Conn {
    pub(super) fn opening(now: Duration) -> Self {
        Self {
            state: State::Opening { since: now },
            unconfirmed: false,
            holds: 0,
            errands: VecDeque::new(),
            renewed: now,
            sent: None,
            idle_since: now,
            worked: false,
        }
    }

    pub(super) fn opened(&mut self, now: Duration) -> bool {
        let wanted = matches!(self.state, State::Opening { .. });
        if wanted {
            self.idle(now);
            self.worked = false;
        }
        wanted
    }

    pub(super) fn idle(&mut self, now: Duration) {
        self.state = State::Idle;
        self.sent = None;
        self.idle_since = now;
        self.worked = true;
    }

    pub(super) fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing { .. })
    }

    pub(super) fn waits(&self) -> bool {
        matches!(self.state, State::Busy(Job::Acquire { waits: Some(_), .. }))
    }

    /// Nobody else can have before what it holds. `None` without a lease.
    pub(super) fn certain_until(&self, config: &Config) -> Option<Duration> {
        config.certain().map(|certain| self.renewed + certain)
    }

    /// When it counts as lost if nothing is heard of it.
    pub(super) fn given_up_at(&self, config: &Config) -> Option<Duration> {
        let patience = match self.state {
            // A driver may hang while it closes a connection, and its place would be missing for ever.
            State::Opening { since } | State::Closing { since } => {
                return Some(since + config.patience(None)?);
            }
            State::Busy(Job::Acquire {
                waits: Some(since), ..
            }) => self
                .sent
                .map(|sent| (sent, Some(sent.saturating_sub(since)))),
            State::Busy(_) => self.sent.map(|sent| (sent, None)),
            State::Idle => None,
        };
        let silent = patience.and_then(|(sent, waiting)| Some(sent + config.patience(waiting)?));
        // A grant that nobody has heard of yet may be older than that. Its question has the patience of each.
        let told = self.holds > usize::from(self.unconfirmed);
        let certain = self.certain_until(config).filter(|_| told);
        silent.into_iter().chain(certain).min()
    }

    /// When it is asked whether it is there.
    pub(super) fn asked_at(&self, config: &Config) -> Option<Duration> {
        (self.state == State::Idle && self.holds > 0)
            .then(|| Some(self.renewed + config.beat()?))?
    }

    /// When it is closed, because nobody needs it.
    pub(super) fn unused_at(&self, config: &Config) -> Option<Duration> {
        (self.state == State::Idle && self.holds == 0).then(|| self.idle_since + config.unused())
    }
}
