//! Plays a scripted server against a machine, and all servers that there can be.
#![allow(dead_code, reason = "the tests of each server use a part of it")]

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::LazyLock;
use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Bind, Cause, ErrorFields, Failure, Machine, Reason, Rows,
    Statement, Step,
};

pub(crate) const DONE: Answer = Answer::Done;
pub(crate) const NULL: Answer = Answer::Rows(Rows::Number(None));
/// An error that says no more: the same as [`plain`]. (A `Cause` cannot be made in a constant.)
pub(crate) static ERROR: LazyLock<Answer> = LazyLock::new(plain);

pub(crate) const fn value(number: i64) -> Answer {
    Answer::Rows(Rows::Number(Some(number)))
}

/// What each error carries as the driver's.
pub(crate) const DRIVERS_ERROR: &str = "the driver's error";

/// An error with these fields and the driver's error in it.
pub(crate) fn error(fields: ErrorFields) -> Answer {
    Answer::Error(ErrorFields {
        cause: Cause::new(DRIVERS_ERROR),
        ..fields
    })
}

/// An error that says no more: PostgreSQL's 55P03 (lock timeout), 57014 (cancelled), 25P02 (the transaction is
/// aborted).
pub(crate) fn plain() -> Answer {
    error(ErrorFields::default())
}

/// The connection is gone, and with it the session.
pub(crate) fn lost() -> Answer {
    error(ErrorFields {
        lost: true,
        ..ErrorFields::default()
    })
}

/// An error with this DETAIL and without a HINT.
pub(crate) fn detail(detail: &str) -> Answer {
    error(ErrorFields {
        detail: Some(detail.into()),
        ..ErrorFields::default()
    })
}

/// PostgreSQL: the error by which dlock's own statements tell something. JSON has no such token.
pub(crate) fn token(token: &str) -> Answer {
    detail(&format!("Token \"{token}\" is invalid."))
}

/// PostgreSQL's 40P01 between two sessions that wait for locks.
pub(crate) fn deadlock() -> Answer {
    error(ErrorFields {
        detail: Some(
            "Process 17 waits for ExclusiveLock on advisory lock [5,0,42,1]; blocked by process 18.\n\
             Process 18 waits for ExclusiveLock on advisory lock [5,0,43,1]; blocked by process 17."
                .into(),
        ),
        hint: true,
        ..ErrorFields::default()
    })
}

/// PostgreSQL's 40P01 with a session that waits for this one's transaction to end, as `CREATE INDEX CONCURRENTLY` does.
pub(crate) fn held_up() -> Answer {
    error(ErrorFields {
        detail: Some(
            "Process 17 waits for ExclusiveLock on advisory lock [5,0,42,1]; blocked by process 18.\n\
             Process 18 waits for ShareLock on virtual transaction 3/1234; blocked by process 17."
                .into(),
        ),
        hint: true,
        ..ErrorFields::default()
    })
}

/// What the server calls itself.
#[allow(dead_code, reason = "not every test binary asks")]
pub(crate) fn version(text: &str) -> Answer {
    Answer::Rows(Rows::Text(text.to_owned()))
}

/// PostgreSQL's 53200: the table of locks is full.
pub(crate) fn out_of_memory() -> Answer {
    error(ErrorFields {
        hint: true,
        ..ErrorFields::default()
    })
}

/// PostgreSQL's 42883.
pub(crate) fn unknown_function() -> Answer {
    error(ErrorFields {
        hint: true,
        position: true,
        ..ErrorFields::default()
    })
}

/// A failure that leaves nothing behind and comes from no error of the driver.
pub(crate) fn clean(reason: Reason) -> Failure {
    Failure {
        reason,
        aftermath: Aftermath::Clean,
        cause: Cause::default(),
        key: None,
    }
}

/// A failure after which the session has to be ended, and that comes from no error of the driver.
pub(crate) fn broken(reason: Reason) -> Failure {
    Failure {
        aftermath: Aftermath::EndSession,
        ..clean(reason)
    }
}

/// The answer was to an earlier question.
pub(crate) fn out_of_step() -> Failure {
    Failure {
        aftermath: Aftermath::EndSessionUnread,
        ..clean(Reason::OutOfStep)
    }
}

/// The session has ended.
pub(crate) fn gone() -> Failure {
    Failure {
        aftermath: Aftermath::MarkBroken,
        ..clean(Reason::Lost)
    }
    .because()
}

pub(crate) trait Because {
    /// Because of the driver's error.
    fn because(self) -> Self;
}

impl Because for Failure {
    fn because(self) -> Self {
        Failure {
            cause: Cause::new(DRIVERS_ERROR),
            ..self
        }
    }
}

pub(crate) const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A conversation: what is sent is asserted, then answered.
#[derive(Debug)]
pub(crate) struct Script<M: Machine> {
    machine: M,
    step: Step<M::Output>,
    now: Duration,
}

pub(crate) fn play<M: Machine>(machine: M) -> Script<M> {
    play_at(machine, Duration::ZERO)
}

/// The clock is at `now` when the conversation starts.
pub(crate) fn play_at<M: Machine>(mut machine: M, now: Duration) -> Script<M> {
    let step = machine.start(now);
    Script { machine, step, now }
}

impl<M: Machine<Output: Debug>> Script<M> {
    /// The statement has this text, with `?` for each bind, and these binds.
    #[track_caller]
    pub(crate) fn query(self, text: &str, binds: &[Bind]) -> Self {
        assert_eq!(self.statement().text(), text);
        self.binds(binds)
    }

    #[track_caller]
    pub(crate) fn binds(self, expected: &[Bind]) -> Self {
        let binds: Vec<_> = self.statement().binds.iter().cloned().collect();
        assert_eq!(binds, expected);
        self
    }

    #[track_caller]
    pub(crate) fn statement(&self) -> &Statement {
        match &self.step {
            Step::Query(statement) => statement,
            other => panic!("not a query: {other:?}"),
        }
    }

    pub(crate) fn step(&self) -> &Step<M::Output> {
        &self.step
    }

    #[track_caller]
    pub(crate) fn batch(self, expected: &str) -> Self {
        assert_eq!(self.text(), expected);
        self
    }

    /// The text of a batch.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        match &self.step {
            Step::Batch(text) => text,
            other => panic!("not a batch: {other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn sleep(self, expected: Duration) -> Self {
        match self.step {
            Step::Sleep(duration) => assert_eq!(duration, expected),
            ref other => panic!("not a sleep: {other:?}"),
        }
        self
    }

    /// The time when the answers from here on come. It is 0 at the start.
    pub(crate) fn at(mut self, now: Duration) -> Self {
        self.now = now;
        self
    }

    /// The answers from here on come so much later.
    pub(crate) fn after(mut self, passed: Duration) -> Self {
        self.now = self.now.saturating_add(passed);
        self
    }

    /// The server's answer to what was asserted before.
    #[track_caller]
    pub(crate) fn answer(mut self, answer: Answer) -> Self {
        assert!(!matches!(self.step, Step::Done(_)), "over: {:?}", self.step);
        self.step = self.machine.next(answer, self.now);
        self
    }

    /// What the caller does if it does not read the answer to what was asserted before.
    #[track_caller]
    pub(crate) fn abandoned(&self) -> Abandoned {
        assert!(!matches!(self.step, Step::Done(_)), "over: {:?}", self.step);
        self.machine.abandon()
    }

    /// How the conversation ended.
    #[track_caller]
    pub(crate) fn ended(self) -> Result<M::Output, Failure> {
        match self.step {
            Step::Done(result) => result,
            other => panic!("not over: {other:?}"),
        }
    }

    /// Because of the driver's error, or not.
    #[track_caller]
    pub(crate) fn failed_as(self, failure: Failure) {
        let ended = self.ended().expect_err("no failure");
        assert_eq!(
            (ended.reason, ended.aftermath),
            (failure.reason, failure.aftermath)
        );
    }

    /// Where the failure comes from an error of the driver, that error can be taken out of it.
    #[track_caller]
    pub(crate) fn failed(self, failure: Failure) {
        // While the machine is there: what it keeps of an error the caller cannot have.
        let (_machine, step) = (self.machine, self.step);
        let Step::Done(result) = step else {
            panic!("not over: {step:?}");
        };
        let ended = result.expect_err("no failure");
        assert_eq!(ended, failure);
        if ended.cause != Cause::default() {
            assert_eq!(ended.cause.into_error(), Some(DRIVERS_ERROR));
        }
    }
}

/// What may be concluded from what was sent and answered, by somebody who knows the server and not the machine.
pub(crate) trait Witness<T> {
    /// Panics if `step` must not be sent after what was answered so far.
    fn sent(&mut self, step: &Step<T>);

    fn answered(&mut self, step: &Step<T>, answer: &Answer, now: Duration);

    /// Panics if this must not be all that is done when nobody reads the answer to `step`.
    fn abandoned(&self, step: &Step<T>, abandoned: &Abandoned);

    /// Panics if the conversation must not end like this.
    fn ended(&mut self, result: Result<T, Failure>, now: Duration);
}

/// Answers a machine with every sequence of `answers` up to `depth`, each [`PACE`] after the one before. Wherever that
/// leaves a conversation, the connection is gone then, and it may go on for a few answers and no longer.
///
/// And wherever that leaves a conversation, it may be abandoned.
///
/// Returns how many conversations that were.
pub(crate) fn walk<M: Machine<Output: Debug>, W: Witness<M::Output>>(
    machine: impl Fn() -> M,
    witness: impl Fn() -> W,
    answers: &[Answer],
    depth: usize,
) -> usize {
    walk_at(machine, witness, answers, depth, PACE)
}

/// How long each answer takes, in [`walk`].
pub(crate) const PACE: Duration = millis(30);

/// The same, with another time between two answers.
pub(crate) fn walk_at<M: Machine<Output: Debug>, W: Witness<M::Output>>(
    machine: impl Fn() -> M,
    witness: impl Fn() -> W,
    answers: &[Answer],
    depth: usize,
    pace: Duration,
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
    let talk = |given: &[Answer]| converse(machine(), witness(), given, pace);
    go(&talk, &mut Vec::new(), answers, depth)
}

/// Whether the conversation was over before the connection had to go.
fn converse<M: Machine<Output: Debug>, W: Witness<M::Output>>(
    mut machine: M,
    mut witness: W,
    given: &[Answer],
    pace: Duration,
) -> bool {
    const PATIENCE: usize = 8;
    let mut log = Log::default();
    let mut given = given.iter();
    let mut gone = 0;
    let mut now = Duration::ZERO;
    let mut step = machine.start(now);
    loop {
        log.step(&step);
        if let Step::Done(result) = step {
            witness.ended(result, now);
            return gone == 0;
        }
        witness.sent(&step);
        witness.abandoned(&step, &machine.abandon());
        now += pace;
        let answer = if matches!(step, Step::Sleep(_) | Step::Tell(_)) {
            DONE // nothing else can come of it
        } else if let Some(answer) = given.next() {
            answer.clone()
        } else {
            gone += 1;
            assert!(gone <= PATIENCE, "goes on without a connection");
            plain()
        };
        log.answer(&answer);
        witness.answered(&step, &answer, now);
        step = machine.next(answer, now);
    }
}

/// Prints the conversation if an assertion fails: the innermost, if there are others.
#[derive(Debug, Default)]
pub(crate) struct Log(Vec<String>);

impl Log {
    pub(crate) fn step<T: Debug>(&mut self, step: &Step<T>) {
        self.0.push(match step {
            Step::Query(statement) => {
                let binds: Vec<_> = statement.binds.iter().collect();
                format!("{:?} {} {binds:?}", statement.prepared, statement.text())
            }
            Step::Batch(text) => text.to_string(),
            other => format!("{other:?}"),
        });
    }

    pub(crate) fn line(&mut self, line: impl Debug) {
        self.0.push(format!("{line:?}"));
    }

    pub(crate) fn answer(&mut self, answer: &Answer) {
        let fields = match answer {
            Answer::Error(error) => format!(
                "error: lost {}, detail {:?}, hint {}, position {}, constraint {:?}",
                error.lost, error.detail, error.hint, error.position, error.constraint
            ),
            other => format!("{other:?}"),
        };
        self.0.push(format!("    {fields}"));
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        thread_local! {
            static PRINTED: Cell<bool> = const { Cell::new(false) };
        }
        if std::thread::panicking() && !PRINTED.replace(true) {
            for line in &self.0 {
                eprintln!("{line}");
            }
        }
    }
}
