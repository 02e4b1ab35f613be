use std::time::Duration;

use super::{
    Abandoned, Aftermath, Answer, Ask, Cause, Failure, Machine, Question, Reason, Statement, Step,
    Wait,
};
use crate::{Holder, LockKey};

/// Asks for the holders of the lock that is acquired.
type AskHolders<A> = fn(&A) -> Question<Vec<Holder>>;

/// Changes a wait, before it starts.
type SetWait<A> = fn(&mut A, Wait);

/// Acquires a lock. If the limit passes and the caller wants to know, it asks who has the lock. If the caller wants to
/// know that while it waits, it asks once, between two turns of the wait. That nobody can tell is no error.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | `Acquire` | what the acquire sends | granted, or failed | ends |
/// | | | it is between two turns, or the first part of its wait has passed | `Look`, once |
/// | | | the limit passed | `Ask`, or gives up |
/// | `Look` | who has the lock? | somebody | `Tell` |
/// | | | nobody, or nobody can tell | `Acquire` goes on |
/// | | | the session is gone | fails, nothing is held |
/// | `Tell` | | | `Acquire` goes on |
/// | `Ask` | who has the lock? | any | fails: the limit passed |
#[derive(Debug)]
pub(crate) struct NameHolders<A> {
    acquire: A,
    state: State,
    ask_holders: AskHolders<A>,
    at_timeout: bool,
    /// Not yet.
    while_waiting: bool,
    wait: Wait,
    since: Duration,
    /// Of several locks: the one that was taken.
    taken: fn(&A) -> Option<Box<LockKey>>,
    /// Where a wait has no turns: how long its first part is.
    parts: Option<(Duration, SetWait<A>)>,
}

#[derive(Debug)]
enum State {
    Acquire,
    /// What comes between two turns.
    Look {
        holders: Box<Question<Vec<Holder>>>,
        then: Then,
    },
    Tell(Then),
    Ask {
        holders: Box<Question<Vec<Holder>>>,
        waited: Duration,
        key: Option<Box<LockKey>>,
    },
}

/// How the wait goes on.
#[derive(Debug)]
enum Then {
    /// With the statement that was held up.
    Send(Box<Statement>),
    /// From its start. Nothing is held and nothing was sent.
    Again,
}

impl<A: Machine<Output = Option<T>>, T> NameHolders<A> {
    /// A limit below this is short.
    const LONG: Duration = Duration::from_secs(2);

    pub(crate) fn new(acquire: A, ask: &Ask, ask_holders: AskHolders<A>) -> Self {
        let is_long = ask.wait.limit.is_none_or(|limit| limit >= Self::LONG);
        Self {
            acquire,
            state: State::Acquire,
            ask_holders,
            at_timeout: ask.name_holders,
            while_waiting: ask.tell_holders && is_long,
            wait: ask.wait,
            since: Duration::ZERO,
            taken: |_| None,
            parts: None,
        }
    }

    /// The timeout names the lock that was taken.
    pub(crate) fn of_several(self, taken: fn(&A) -> Option<Box<LockKey>>) -> Self {
        Self { taken, ..self }
    }

    /// The wait has no turns. For a caller who wants to know who has the lock it is cut in two after `first`, which
    /// costs the place in the queue once. It is a second or more: MySQL waits whole seconds in one statement.
    pub(crate) fn without_turns(self, first: Duration, set_wait: SetWait<A>) -> Self {
        Self {
            parts: Some((first, set_wait)),
            ..self
        }
    }

    fn acquiring(&mut self, step: Step<Option<T>>, now: Duration) -> Step<Option<T>> {
        match step {
            Step::Done(Ok(None)) if self.while_waiting && self.parts.is_some() => {
                self.look(Then::Again, now)
            }
            Step::Done(Ok(None)) if self.at_timeout => {
                let waited = now.saturating_sub(self.since);
                let mut holders = Box::new((self.ask_holders)(&self.acquire));
                let key = (self.taken)(&self.acquire);
                let step = holders.start(now);
                self.state = State::Ask {
                    holders,
                    waited,
                    key: key.clone(),
                };
                named(step, waited, key)
            }
            Step::Query(next) if self.while_waiting && next.between_turns => {
                self.look(Then::Send(next.into()), now)
            }
            step => step,
        }
    }

    fn look(&mut self, then: Then, now: Duration) -> Step<Option<T>> {
        self.while_waiting = false;
        let mut holders = Box::new((self.ask_holders)(&self.acquire));
        let step = holders.start(now);
        self.looking(step, holders, then, now)
    }

    fn looking(
        &mut self,
        step: Step<Vec<Holder>>,
        holders: Box<Question<Vec<Holder>>>,
        then: Then,
        now: Duration,
    ) -> Step<Option<T>> {
        match step {
            Step::Done(Ok(holders)) if holders.iter().any(|holder| holder.granted) => {
                self.state = State::Tell(then);
                Step::Tell(holders)
            }
            Step::Done(Err(failure))
                if matches!(failure.reason, Reason::Lost | Reason::OutOfStep) =>
            {
                Step::failed(match (self.taken)(&self.acquire) {
                    Some(key) => failure.about(&key),
                    None => failure,
                })
            }
            Step::Done(_) => self.go_on(then, now),
            step => {
                self.state = State::Look { holders, then };
                step.map(|_| unreachable!("BUG: it is not done"))
            }
        }
    }

    fn go_on(&mut self, then: Then, now: Duration) -> Step<Option<T>> {
        self.state = State::Acquire;
        match then {
            Then::Send(next) => Step::Query(*next),
            Then::Again => {
                let limit = self.wait.remaining(now.saturating_sub(self.since));
                self.restart(limit, now)
            }
        }
    }

    fn restart(&mut self, limit: Option<Duration>, now: Duration) -> Step<Option<T>> {
        if let Some((_, set_wait)) = self.parts {
            set_wait(&mut self.acquire, Wait { limit, ..self.wait });
        }
        let step = self.acquire.start(now);
        self.acquiring(step, now)
    }
}

fn named<T>(
    step: Step<Vec<Holder>>,
    waited: Duration,
    key: Option<Box<LockKey>>,
) -> Step<Option<T>> {
    step.map(|holders| {
        let (holders, aftermath) = match holders {
            Ok(holders) => (holders, Aftermath::Clean),
            Err(failure) => (Vec::new(), failure.aftermath),
        };
        let timeout = Reason::Timeout { waited, holders };
        Step::failed(Failure {
            aftermath,
            key,
            ..timeout.clean(Cause::default())
        })
    })
}

impl<A: Machine<Output = Option<T>>, T> Machine for NameHolders<A> {
    type Output = Option<T>;

    fn start(&mut self, now: Duration) -> Step<Option<T>> {
        self.since = now;
        match self.parts {
            Some((first, _)) if self.while_waiting => self.restart(Some(first), now),
            _ => {
                let step = self.acquire.start(now);
                self.acquiring(step, now)
            }
        }
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<Option<T>> {
        match std::mem::replace(&mut self.state, State::Acquire) {
            State::Acquire => {
                let step = self.acquire.next(answer, now);
                self.acquiring(step, now)
            }
            State::Look { mut holders, then } => {
                let step = holders.next(answer, now);
                self.looking(step, holders, then, now)
            }
            State::Tell(then) => self.go_on(then, now),
            State::Ask {
                mut holders,
                waited,
                key,
            } => {
                let step = holders.next(answer, now);
                self.state = State::Ask {
                    holders,
                    waited,
                    key: key.clone(),
                };
                named(step, waited, key)
            }
        }
    }

    fn abandon(&self) -> Abandoned {
        match &self.state {
            // The answers of PostgreSQL stay in step.
            State::Acquire
            | State::Look {
                then: Then::Send(_),
                ..
            }
            | State::Tell(Then::Send(_)) => self.acquire.abandon(),
            State::Tell(Then::Again) => Abandoned::default(),
            State::Look { holders, .. } | State::Ask { holders, .. } => holders.abandon(),
        }
    }
}
