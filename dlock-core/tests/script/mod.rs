//! Plays a scripted server against a machine, and all servers that there can be.

use std::time::Duration;

use dlock_core::{Abandoned, Answer, Failure, Machine, Outcome, Piece, Reason, Statement, Step};

pub(crate) const DONE: Answer = Answer::Done;
pub(crate) const NULL: Answer = Answer::Value(None);
/// An error that says no more: a statement that stands alone, or a connection that is gone.
pub(crate) const ERROR: Answer = Answer::Error(None);

pub(crate) fn value(number: i64) -> Answer {
    Answer::Value(Some(number))
}

/// An error with a CONSTRAINT.
pub(crate) fn error(constraint: &str) -> Answer {
    Answer::Error(Some(constraint.into()))
}

pub(crate) fn clean(reason: Reason) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        broken: false,
    })
}

pub(crate) fn broken(reason: Reason) -> Outcome {
    Outcome::Failed(Failure {
        reason,
        broken: true,
    })
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A conversation: what is sent is asserted, then answered.
#[derive(Debug)]
pub(crate) struct Script<M> {
    machine: M,
    step: Step,
    elapsed: Duration,
}

pub(crate) fn play<M: Machine>(mut machine: M) -> Script<M> {
    let step = machine.start();
    Script {
        machine,
        step,
        elapsed: Duration::ZERO,
    }
}

impl<M: Machine> Script<M> {
    /// The statement has this text, with `?` for each bind, and these binds.
    #[track_caller]
    pub(crate) fn query(self, text: &str, binds: &[Piece]) -> Self {
        assert_eq!(self.statement().text(), text);
        self.binds(binds)
    }

    /// Without the nonce, which comes first.
    #[track_caller]
    pub(crate) fn binds(self, expected: &[Piece]) -> Self {
        assert_eq!(binds(self.statement()), expected);
        self
    }

    #[track_caller]
    pub(crate) fn statement(&self) -> &Statement {
        match self.step() {
            Step::Query(statement) => statement,
            other => panic!("not a query: {other:?}"),
        }
    }

    pub(crate) fn step(&self) -> &Step {
        &self.step
    }

    #[track_caller]
    pub(crate) fn batch(self, text: &str) -> Self {
        assert_eq!(self.step, Step::Batch(text.to_owned().into()));
        self
    }

    #[track_caller]
    pub(crate) fn sleep(self, duration: Duration) -> Self {
        assert_eq!(self.step, Step::Sleep(duration));
        self
    }

    /// The time since the start when the answers from here on come.
    pub(crate) fn at(mut self, elapsed: Duration) -> Self {
        self.elapsed = elapsed;
        self
    }

    /// The server's answer to what was asserted before.
    #[track_caller]
    pub(crate) fn answer(mut self, answer: Answer) -> Self {
        assert!(!matches!(self.step, Step::Done(_)), "over: {:?}", self.step);
        self.step = self.machine.next(answer, self.elapsed);
        self
    }

    /// What is to be done if nobody waits for the answer to what was asserted before.
    #[track_caller]
    pub(crate) fn abandoned(&self) -> Abandoned {
        assert!(!matches!(self.step, Step::Done(_)), "over: {:?}", self.step);
        self.machine.abandon()
    }

    #[track_caller]
    pub(crate) fn ends(self, outcome: Outcome) {
        assert_eq!(self.step, Step::Done(outcome));
    }
}

/// The binds of a statement, without its nonce, which comes first.
pub(crate) fn binds(statement: &Statement) -> Vec<Piece> {
    let is_bind = |piece: &&Piece| !matches!(piece, Piece::Sql(_));
    let binds = statement.pieces.iter().filter(is_bind).cloned();
    binds.skip(statement.nonce.is_some().into()).collect()
}

/// What may be concluded from what was sent and answered, by somebody who knows the server and not the machine.
pub(crate) trait Witness {
    /// Panics if `step` must not be sent after what was answered so far.
    fn sent(&mut self, step: &Step);

    fn answered(&mut self, step: &Step, answer: &Answer, elapsed: Duration);

    /// Panics if this must not be all that is done when nobody reads the answer to `step`.
    fn abandoned(&self, step: &Step, abandoned: &Abandoned);

    /// Panics if the conversation must not end like this.
    fn ended(&mut self, outcome: Outcome, elapsed: Duration);
}

/// Answers a machine with every sequence of `answers` up to `depth`, each 30 ms after the one before. Wherever that
/// leaves a conversation, the connection is gone then, and it may go on for a few answers and no longer.
///
/// And wherever that leaves a conversation, it may be abandoned.
///
/// Returns how many conversations that were.
pub(crate) fn walk<M: Machine, W: Witness>(
    machine: impl Fn() -> M,
    witness: impl Fn() -> W,
    answers: &[Answer],
    depth: usize,
) -> usize {
    fn go(
        talk: &impl Fn(&[Answer]) -> bool,
        given: &mut Vec<Answer>,
        answers: &[Answer],
        depth: usize,
    ) -> usize {
        // Machines cannot be cloned, so each conversation is repeated from its start.
        let over = talk(given);
        if over || given.len() == depth {
            return 1;
        }
        let mut conversations = 1;
        for answer in answers {
            given.push(answer.clone());
            conversations += go(talk, given, answers, depth);
            given.pop();
        }
        conversations
    }
    let talk = |given: &[Answer]| converse(machine(), witness(), given);
    go(&talk, &mut Vec::new(), answers, depth)
}

/// Whether the conversation was over before the connection had to go.
fn converse<M: Machine, W: Witness>(mut machine: M, mut witness: W, given: &[Answer]) -> bool {
    const PATIENCE: usize = 8;
    let mut log = Log::default();
    let mut given = given.iter();
    let mut gone = 0;
    let mut elapsed = Duration::ZERO;
    let mut step = machine.start();
    loop {
        log.steps.push(step.clone());
        if let Step::Done(outcome) = step {
            witness.ended(outcome, elapsed);
            return gone == 0;
        }
        witness.sent(&step);
        witness.abandoned(&step, &machine.abandon());
        elapsed += millis(30);
        let answer = if matches!(step, Step::Sleep(_)) {
            DONE // nothing else can come of it
        } else if let Some(answer) = given.next() {
            answer.clone()
        } else {
            gone += 1;
            assert!(gone <= PATIENCE, "goes on without a connection");
            ERROR
        };
        log.answers.push(answer.clone());
        witness.answered(&step, &answer, elapsed);
        step = machine.next(answer, elapsed);
    }
}

/// Prints the conversation if an assertion fails.
#[derive(Default)]
struct Log {
    steps: Vec<Step>,
    answers: Vec<Answer>,
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (at, step) in self.steps.iter().enumerate() {
                eprintln!("{step:?}");
                if let Some(answer) = self.answers.get(at) {
                    eprintln!("    {answer:?}");
                }
            }
        }
    }
}
