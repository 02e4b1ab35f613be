use std::sync::Arc;
use std::time::Duration;

use super::action::Wanted;
use super::config::Config;
use super::line::Request;
use super::slab::Id;
use crate::{LockKey, Mode};

/// What a session holds, or asks for.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) line: Id,
    pub(super) conn: Id,
    pub(super) what: Arc<Wanted>,
    /// Other names that are held with it.
    pub(super) more: Arc<[LockKey]>,
    /// Of a semaphore: which one.
    pub(super) slot: Option<u32>,
    pub(super) state: HoldState,
    /// Who uses it.
    pub(super) tickets: Vec<Id>,
    /// When it was granted.
    pub(super) since: Duration,
    /// How many requests it has served.
    pub(super) turns: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HoldState {
    Asked,
    /// Granted, but the session may have been idle for long.
    Confirming,
    Held,
    /// The ticket wants to know.
    Releasing(Option<Id>),
}

impl Hold {
    pub(super) fn asked(line: Id, conn: Id, request: &Request) -> Self {
        Self {
            line,
            conn,
            what: Arc::clone(&request.what),
            more: Arc::clone(&request.more),
            slot: None,
            state: HoldState::Asked,
            tickets: Vec::new(),
            since: Duration::ZERO,
            turns: 0,
        }
    }

    /// Whether a request of this process may have it, now or together with those who do.
    pub(super) fn serves(&self, request: &Request, config: &Config, now: Duration) -> bool {
        let free = self.tickets.is_empty() || self.what.mode == Mode::Shared;
        let fresh = self.turns == 0;
        let left = self.turns < config.turns && now < self.since + config.turn;
        self.state == HoldState::Held && self.is(request) && free && (fresh || left)
    }

    /// Whether it is what somebody wants.
    fn is(&self, request: &Request) -> bool {
        match request.what.permits {
            None => *self.what == *request.what && self.more == request.more,
            Some(permits) => self.slot.is_some_and(|slot| slot < permits),
        }
    }

    pub(super) fn is_shared(&self) -> bool {
        self.state == HoldState::Held && self.what.mode == Mode::Shared
    }
}
