//! Several locks that are taken and released as one.

mod each;

pub(crate) use each::ReleaseEach;

use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

use super::{
    Abandoned, AfterBusy, Aftermath, Answer, Ask, Cause, Failure, Hold, Machine, Reason, Step,
    Wait, Waiting,
};
use crate::{InvalidKey, LockKey};

/// How many different locks can be taken as one. A server has a table of locks of limited size, for all sessions.
pub const MOST_LOCKS: usize = 250;

/// The keys in the form of the server, each of them once, in the order in which everybody takes them, and with the name
/// by which the caller knows it.
///
/// # Errors
///
/// An invalid key, none at all, or more than [`MOST_LOCKS`].
pub(crate) fn in_order<K, O: Ord>(
    ask: &Ask,
    map: impl Fn(&LockKey) -> Result<K, InvalidKey>,
    order: impl Fn(&K) -> O,
) -> Result<Vec<(K, LockKey)>, Failure> {
    if ask.nothing {
        return Err(ask.key.names_nothing().into());
    }
    let keys = ask.keys().map(|key| Ok((map(key)?, key.clone())));
    let mut keys = keys.collect::<Result<Vec<_>, InvalidKey>>()?;
    keys.sort_by_key(|(key, _)| order(key));
    keys.dedup_by(|one, other| order(&one.0) == order(&other.0));
    match keys.get(MOST_LOCKS) {
        Some((_, name)) => Err(Reason::TooManyLocks.clean(Cause::default()).about(name)),
        None => Ok(keys),
    }
}

/// How a server takes several locks.
pub(crate) trait Steps: Debug + Send {
    type Key: Debug + Send;
    /// Takes a range of the locks, as far as it can without waiting.
    type Try: Machine<Output = Tried> + Debug;
    /// Takes one lock and waits for it.
    type Wait: Machine<Output = Option<Hold<Self::Key>>> + Debug;
    /// Gives back some of the locks.
    type Back: Machine<Output = ()> + Debug;

    /// Whether the locks outlive a session that is ended.
    const OUTLIVE: bool = false;

    /// The names of the locks, in the order of the server.
    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey>;

    /// `None`: they are taken one by one.
    fn try_all(&self, range: Range<usize>) -> Option<Self::Try>;

    fn wait(&self, index: usize, wait: Wait) -> Self::Wait;

    /// A lock that this [`Try`](Self::Try) has taken.
    fn hold(&self, index: usize, tried: &Self::Try) -> Hold<Self::Key>;

    fn give_back(&self, holds: Vec<Hold<Self::Key>>) -> Self::Back;

    /// What is to be done if the conversation ends in the middle: by the machine that was at work, and about the locks
    /// that the session holds so far, at least one.
    fn abandoned(&self, at_work: Abandoned, held: &[Hold<Self::Key>]) -> Abandoned;
}

/// What came of a try at a range of locks.
#[derive(Debug, PartialEq)]
pub(crate) struct Tried {
    /// So many of them are held now, from the start of the range.
    pub(crate) held: usize,
    pub(crate) end: TriedEnd,
}

#[derive(Debug, PartialEq)]
pub(crate) enum TriedEnd {
    /// All are held.
    All,
    /// This one is taken, counted from the start of the range. There may be others between it and those that are held.
    Taken(usize),
    /// The try has failed, and what is held is known.
    Failed(Failure),
}

/// The try of a server that takes locks one by one.
#[derive(Debug)]
pub(crate) enum NoTry {}

impl Machine for NoTry {
    type Output = Tried;

    fn start(&mut self, _now: Duration) -> Step<Tried> {
        match *self {}
    }

    fn next(&mut self, _answer: Answer, _now: Duration) -> Step<Tried> {
        match *self {}
    }

    fn abandon(&self) -> Abandoned {
        match *self {}
    }
}

/// Acquires several locks as one, in the order of the server.
///
/// While it waits for a lock it keeps those before it in the order, and holds none behind it. Everybody does so, so
/// there is no deadlock, and a request that has got one lock does not lose it to others while it waits for the next.
///
/// | state | at work | ends with | then |
/// |---|---|---|---|
/// | `Try` | takes the rest, without waiting | all | granted |
/// | | | one is taken | `Try` those before it, `Wait` for it; or `Back`: the limit passed |
/// | `Wait` | waits for the lock that is taken | granted | `Try` those behind it, or granted |
/// | | | the limit passed | `Back` |
/// | `Try`, `Wait` | | failed | `Back`, unless the session is ended |
/// | `Back` | gives back what it has taken | | gives up, or fails |
#[derive(Debug)]
pub(crate) struct Several<S: Steps> {
    steps: S,
    wait: Wait,
    waiting: Waiting,
    held: Vec<Hold<S::Key>>,
    /// The lock that it tries or waits for, or that was taken.
    at: usize,
    state: State<S>,
}

#[derive(Debug)]
enum State<S: Steps> {
    Start,
    Try(S::Try),
    Wait(S::Wait),
    Back {
        machine: S::Back,
        then: Option<Failure>,
    },
}

type Acquired<S> = Step<Option<Hold<<S as Steps>::Key>>>;

impl<S: Steps> Several<S> {
    pub(crate) fn new(steps: S, wait: Wait) -> Self {
        Self {
            steps,
            wait,
            waiting: wait.since(Duration::ZERO),
            held: Vec::new(),
            at: 0,
            state: State::Start,
        }
    }

    pub(crate) fn steps(&self) -> &S {
        &self.steps
    }

    /// The lock that it tries or waits for, or that was taken.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    fn name(&self) -> &LockKey {
        let mut names = self.steps.names();
        names.nth(self.at).expect("BUG: it is one of them")
    }

    /// Goes on with the first lock that it does not hold.
    fn go_on(&mut self, now: Duration) -> Acquired<S> {
        let (from, all) = (self.held.len(), self.steps.names().len());
        match all - from {
            0 => Step::Done(Ok(Hold::together(std::mem::take(&mut self.held)))),
            // Nothing is saved by a try of its own.
            1 => self.wait_for(from, now),
            _ => self.try_all(from..all, now),
        }
    }

    fn try_all(&mut self, range: Range<usize>, now: Duration) -> Acquired<S> {
        self.at = range.start;
        let Some(mut machine) = self.steps.try_all(range) else {
            return self.wait_for(self.at, now);
        };
        let step = machine.start(now);
        self.state = State::Try(machine);
        self.follow_try(step, now)
    }

    fn follow_try(&mut self, step: Step<Tried>, now: Duration) -> Acquired<S> {
        let tried = match step {
            Step::Done(Ok(tried)) => tried,
            step => {
                return step.map(|result| match result {
                    Ok(_) => unreachable!("BUG: it is not done"),
                    Err(failure) => self.fail(failure, now),
                });
            }
        };
        let from = self.held.len();
        let taken = from..from + tried.held;
        let State::Try(machine) = &self.state else {
            unreachable!("BUG: nothing was tried")
        };
        self.held
            .extend(taken.map(|index| self.steps.hold(index, machine)));
        match tried.end {
            TriedEnd::All if self.held.len() == self.steps.names().len() => self.go_on(now),
            // Those before the one that was taken.
            TriedEnd::All => self.wait_for(self.held.len(), now),
            TriedEnd::Taken(index) => {
                self.at = from + index;
                if self.waiting.after_busy(now) == AfterBusy::GiveUp {
                    return self.give_back(None, now);
                }
                match self.held.len() {
                    held if held < self.at => self.try_all(held..self.at, now),
                    held => self.wait_for(held, now),
                }
            }
            TriedEnd::Failed(failure) => self.fail(failure, now),
        }
    }

    fn wait_for(&mut self, index: usize, now: Duration) -> Acquired<S> {
        self.at = index;
        let limit = self.wait.remaining(self.waiting.waited(now));
        let mut machine = self.steps.wait(index, Wait { limit, ..self.wait });
        let step = machine.start(now);
        self.state = State::Wait(machine);
        self.follow_wait(step, now)
    }

    fn follow_wait(&mut self, step: Acquired<S>, now: Duration) -> Acquired<S> {
        step.map(|result| match result {
            Ok(Some(mut hold)) => {
                hold.name = Some(Box::new(self.name().clone()));
                self.held.push(hold);
                self.go_on(now)
            }
            Ok(None) => self.give_back(None, now),
            Err(failure) => self.fail(failure, now),
        })
    }

    fn fail(&mut self, failure: Failure, now: Duration) -> Acquired<S> {
        let failure = failure.about(self.name());
        // The end of the session frees them.
        if failure.aftermath != Aftermath::Clean && !S::OUTLIVE {
            return Step::failed(failure);
        }
        self.give_back(Some(failure), now)
    }

    /// Nothing is held afterwards. `then` is what it fails with, if it does not just give up.
    fn give_back(&mut self, then: Option<Failure>, now: Duration) -> Acquired<S> {
        if self.held.is_empty() {
            return Step::Done(then.map_or(Ok(None), Err));
        }
        let mut machine = self.steps.give_back(std::mem::take(&mut self.held));
        let step = machine.start(now);
        self.state = State::Back { machine, then };
        self.follow_back(step)
    }

    fn follow_back(&mut self, step: Step<()>) -> Acquired<S> {
        step.map(|result| {
            let State::Back { then, .. } = std::mem::replace(&mut self.state, State::Start) else {
                unreachable!("BUG: nothing is given back")
            };
            Step::Done(match (result, then) {
                (Ok(()), None) => Ok(None),
                (Ok(()), Some(failure)) | (Err(failure), None) => Err(failure),
                (Err(Failure { aftermath, .. }), Some(failure)) => Err(Failure {
                    aftermath: aftermath.worse(failure.aftermath),
                    ..failure
                }),
            })
        })
    }
}

impl<S: Steps> Machine for Several<S> {
    type Output = Option<Hold<S::Key>>;

    fn start(&mut self, now: Duration) -> Acquired<S> {
        self.waiting.start(now);
        self.go_on(now)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Acquired<S> {
        match &mut self.state {
            State::Start => unreachable!("BUG: nothing was asked"),
            State::Try(machine) => {
                let step = machine.next(answer, now);
                self.follow_try(step, now)
            }
            State::Wait(machine) => {
                let step = machine.next(answer, now);
                self.follow_wait(step, now)
            }
            State::Back { machine, .. } => {
                let step = machine.next(answer, now);
                self.follow_back(step)
            }
        }
    }

    fn abandon(&self) -> Abandoned {
        let at_work = match &self.state {
            State::Start => return Abandoned::default(),
            State::Try(machine) => machine.abandon(),
            State::Wait(machine) => machine.abandon(),
            State::Back { machine, .. } => return machine.abandon(),
        };
        match self.held.is_empty() {
            true => at_work,
            false => self.steps.abandoned(at_work, &self.held),
        }
    }
}
