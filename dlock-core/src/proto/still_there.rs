use std::marker::PhantomData;
use std::time::Duration;

use super::{Abandoned, Aftermath, Answer, Dialect, Failure, Machine, Reason, Step};

/// How a session is asked whether it is there.
#[derive(Clone, Copy, Debug)]
pub struct AreYouThere {
    pub(crate) message: &'static str,
    /// Whether a session that is there obeys, whatever its state, so that any error means that it is gone.
    pub(crate) is_obeyed: bool,
}

/// A conversation that tells a session that is gone from one that has failed.
///
/// A server that ends a session says so as the answer to what was asked last, and not every driver tells that from
/// other errors. So after an error that nobody can name, the session is asked whether it is there.
///
/// | state | sent | answer | then |
/// |---|---|---|---|
/// | talks | what the conversation sends | it fails with an error that nobody can name | asks |
/// | | | it ends otherwise | ends so |
/// | asks | [`Dialect::ARE_YOU_THERE`] | the session is gone | fails: lost |
/// | | | it is there | fails as the conversation did |
#[derive(Debug)]
pub struct StillThere<D, M> {
    machine: M,
    /// Of a conversation that has failed.
    failure: Option<Box<Failure>>,
    dialect: PhantomData<fn() -> D>,
}

impl<D: Dialect, M: Machine> StillThere<D, M> {
    /// Wraps a conversation with a server of the dialect.
    pub fn new(machine: M) -> Self {
        Self {
            machine,
            failure: None,
            dialect: PhantomData,
        }
    }

    /// Asks in place of a failure. A step is not moved here: that would cost a free lock a hundred instructions.
    #[inline]
    fn ask(&mut self, step: &mut Step<M::Output>) {
        if let (Some(failure), Some(ask)) = (unnamed(step), D::ARE_YOU_THERE) {
            self.failure = Some(Box::new(failure.clone()));
            *step = Step::Batch(ask.message.into());
        }
    }
}

fn unnamed<T>(step: &Step<T>) -> Option<&Failure> {
    match step {
        Step::Done(Err(failure)) if failure.reason == Reason::Database => {
            Some(failure).filter(|failure| failure.cause.is_some())
        }
        _ => None,
    }
}

fn is_gone(ask: Option<AreYouThere>, answer: &Answer) -> bool {
    match answer {
        Answer::Error(error) => error.lost || ask.is_some_and(|ask| ask.is_obeyed),
        Answer::Done | Answer::Rows(_) => false,
    }
}

impl<D: Dialect, M: Machine> Machine for StillThere<D, M> {
    type Output = M::Output;

    const TIMED: bool = M::TIMED;

    #[inline]
    fn start(&mut self, now: Duration) -> Step<M::Output> {
        let mut step = self.machine.start(now);
        self.ask(&mut step);
        step
    }

    #[inline]
    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        if let Some(failure) = self.failure.take() {
            return Step::failed(match is_gone(D::ARE_YOU_THERE, &answer) {
                true => Failure {
                    reason: Reason::Lost,
                    // No less than the failure asked for: the session may be there, and each question was killed.
                    aftermath: failure.aftermath.worse(Aftermath::MarkBroken),
                    ..*failure
                },
                false => *failure,
            });
        }
        let mut step = self.machine.next(answer, now);
        self.ask(&mut step);
        step
    }

    fn abandon(&self) -> Abandoned {
        match self.failure {
            None => self.machine.abandon(),
            // An answer that nobody reads puts connections to MySQL out of step, and what the failure asks for has not
            // been done.
            Some(_) => Abandoned::broken(),
        }
    }
}
