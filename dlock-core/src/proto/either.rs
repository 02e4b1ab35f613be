use std::time::Duration;

use super::{Abandoned, Answer, Machine, Step};

/// One of two conversations with the same output.
#[derive(Debug)]
pub(crate) enum Either<A, B> {
    One(A),
    Several(Box<B>),
}

impl<A, B> Either<A, B> {
    pub(crate) fn several(machine: B) -> Self {
        Either::Several(Box::new(machine))
    }
}

impl<A: Machine, B: Machine<Output = A::Output>> Machine for Either<A, B> {
    type Output = A::Output;

    const TIMED: bool = A::TIMED || B::TIMED;

    fn start(&mut self, now: Duration) -> Step<Self::Output> {
        match self {
            Either::One(machine) => machine.start(now),
            Either::Several(machine) => machine.start(now),
        }
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<Self::Output> {
        match self {
            Either::One(machine) => machine.next(answer, now),
            Either::Several(machine) => machine.next(answer, now),
        }
    }

    fn abandon(&self) -> Abandoned {
        match self {
            Either::One(machine) => machine.abandon(),
            Either::Several(machine) => machine.abandon(),
        }
    }
}
