//! The machines of MySQL and MariaDB, answer by answer, and against a model of a session.
#![cfg(feature = "mysql")]

mod script;

use std::fmt::Debug;
use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Bind, Cause, Columns, Dialect, Failure, Hold, Machine,
    Mysql, Parting, Prepared, Reason, Rows, Session, Statement, Step, StillThere, Wait,
};
use dlock_core::{Holder, LockKey, Mode};
use script::{
    Because, DONE, NULL, Script, broken, clean, lost, millis, plain, play, play_at, value,
};

/// The number in the text of a question.
const BASE: i64 = 1 << 62;

const KEEP_ERRNO: &str = "GET DIAGNOSTICS CONDITION /*M! 1 */ /*!80000 @@warning_count */ \
    @dlock_errno = MYSQL_ERRNO";

macro_rules! explained {
    ($($text:literal),*) => {
        concat!(
            "/* dlock: acquires or releases a named lock; a large number marks the request, so that no answer is taken for another's */ ",
            $($text),*
        )
    };
}

const RELEASE: &str = explained!(
    "SELECT 1 FROM DUAL WHERE RELEASE_LOCK(CONVERT(? USING utf8mb4)) = 1 LIMIT 1 INTO @dlock_answer"
);
const UNANSWERED: &str =
    explained!("SELECT 4611686018427387904 + CAST(? AS SIGNED) + @dlock_answer AS answer");
const IS_HELD: &str = explained!(
    "SELECT 1 FROM DUAL WHERE IS_USED_LOCK(CONVERT(? USING utf8mb4)) <=> CONNECTION_ID() \
     LIMIT 1 INTO @dlock_answer"
);
const IS_HELD_TAGGED: &str = explained!(
    "SELECT 4611686018427387904 + CAST(? AS SIGNED) \
     + (IS_USED_LOCK(CONVERT(? USING utf8mb4)) <=> CONNECTION_ID()) AS answer"
);
const EXAMINE: &str = explained!(
    "SELECT CAST(@dlock_errno AS SIGNED) AS errno, \
     4611686018427387904 + CAST(? AS SIGNED) + (@dlock_request <=> CAST(? AS SIGNED) \
     AND IS_USED_LOCK(CONVERT(? USING utf8mb4)) <=> CONNECTION_ID()) AS answer"
);

/// Whether this may be one of several servers that take writes.
const ONE_OF_SEVERAL: &str = "/*M! @@wsrep_on AND */ /*!80000 @@global.auto_increment_increment + \
     @@global.auto_increment_offset <> 2 AND */ @dlock_one_node IS NULL";

/// The text of a request that MySQL ends after so many milliseconds, if they are less than a second.
fn text_of_request(droppable: bool, ends: Option<u32>) -> String {
    let (limit, mysql) = match ends {
        None => (u32::MAX, "DIV 1000"),
        Some(ends) => (ends, "DIV 1000 + 1"),
    };
    let get_lock = format!(
        "IFNULL(GET_LOCK(IF({ONE_OF_SEVERAL}, REPEAT('-', 999), CONVERT(? USING utf8mb4)), \
         ? /*M! * 0.001 */ /*!80000 {mysql} */), 2)"
    );
    let asked = match droppable {
        true => format!(
            "4611686018427387904 + (@dlock_request := CAST(? AS SIGNED)) \
             + IF(?, IFNULL(RELEASE_LOCK(CONVERT(? USING utf8mb4)), 0), {get_lock}) AS answer"
        ),
        false => format!(
            "1 FROM DUAL WHERE IF((@dlock_request := CAST(? AS SIGNED)) IS NULL, 2, \
             @dlock_answer := {get_lock}) = 1 LIMIT 1 INTO @dlock_answer"
        ),
    };
    format!(
        "{}/*M! SET STATEMENT max_statement_time = 0 FOR */ \
         SELECT /*+ MAX_EXECUTION_TIME({limit}) */ {asked}",
        explained!("")
    )
}

/// `report`, where there are no binds.
const REPORT: &str = "CONVERT(x'7265706f7274' USING utf8mb4)";

/// A session that is there obeys it.
const ARE_YOU_THERE: &str = "SET @dlock_there = 1";

/// What a wait without a limit asks for, in milliseconds.
const FOREVER: i64 = 1_000_000_000_000;

/// Another session has the lock.
const TAKEN: i64 = 0;
const GRANTED: i64 = 1;
/// MariaDB after KILL QUERY.
const KILLED: i64 = 2;

const TIMEOUTS: [i64; 2] = [3024, 1969];

/// Before asking again where a wait ended early.
const PAUSE: Duration = Duration::from_millis(1);

/// The first bind of a question is its tag.
fn tag(statement: &Statement) -> i64 {
    match statement.binds.iter().next() {
        Some(Bind::BigInt(tag)) => *tag,
        other => panic!("no tag: {other:?}"),
    }
}

/// A machine whose server adds the tag of a question to the number in its answer.
#[derive(Debug)]
struct Tagged<M> {
    machine: M,
    tag: i64,
}

/// Whether the number in an answer has a tag. Callers that do not drop their conversations do not need it.
fn is_tagged(statement: &Statement) -> bool {
    matches!(statement.columns, Columns::Number | Columns::Pair)
}

impl<M> Tagged<M> {
    fn new(machine: M) -> Self {
        Self {
            machine,
            tag: -BASE,
        }
    }

    fn note<T>(&mut self, step: Step<T>) -> Step<T> {
        if let Step::Query(statement) = &step {
            self.tag = if is_tagged(statement) {
                tag(statement)
            } else {
                -BASE
            };
        }
        step
    }
}

impl<M: Machine> Machine for Tagged<M> {
    type Output = M::Output;

    const TIMED: bool = M::TIMED;

    fn start(&mut self, now: Duration) -> Step<M::Output> {
        let step = self.machine.start(now);
        self.note(step)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        let tagged = |number: i64| number.wrapping_add(BASE).wrapping_add(self.tag);
        let answer = match answer {
            Answer::Rows(Rows::Number(number)) => Answer::Rows(Rows::Number(number.map(tagged))),
            Answer::Rows(Rows::Pair(errno, number)) => {
                Answer::Rows(Rows::Pair(errno, number.map(tagged)))
            }
            answer => answer,
        };
        let step = self.machine.next(answer, now);
        self.note(step)
    }

    fn abandon(&self) -> Abandoned {
        self.machine.abandon()
    }
}

/// The answer was another one's.
fn out_of_step() -> Failure {
    Failure {
        aftermath: Aftermath::EndSessionUnread,
        ..clean(Reason::OutOfStep)
    }
}

/// The connection may be out of step.
fn marked_broken(reason: Reason) -> Failure {
    Failure {
        aftermath: Aftermath::MarkBroken,
        ..clean(reason)
    }
}

/// The session has ended.
fn gone() -> Failure {
    Failure {
        reason: Reason::Lost,
        ..script::gone()
    }
}

/// What the session tells of a request that failed.
fn examined(errno: impl Into<Option<i64>>, granted: i64) -> Answer {
    Answer::Rows(Rows::Pair(errno.into(), Some(granted)))
}

const NULL_PAIR: Answer = Answer::Rows(Rows::Pair(None, None));

const UNLIMITED: Wait = Wait {
    limit: None,
    poll: None,
};

fn limit(limit: Duration) -> Wait {
    Wait {
        limit: Some(limit),
        poll: None,
    }
}

const TRY: Wait = Wait {
    limit: Some(Duration::ZERO),
    poll: None,
};

fn poll(limit: Option<Duration>) -> Wait {
    Wait {
        limit,
        poll: Some(millis(50)),
    }
}

/// Asks for the lock `report`.
fn asks(wait: Wait) -> Ask {
    Ask {
        wait,
        name_holders: false,
        ..Ask::new(LockKey::from("report"))
    }
}

/// As an async caller does.
fn droppable(wait: Wait) -> Ask {
    Ask {
        droppable: true,
        ..asks(wait)
    }
}

/// The caller wants to know who has the lock.
fn telling(ask: Ask) -> Ask {
    Ask {
        tell_holders: true,
        ..ask
    }
}

fn cancellable(wait: Wait) -> Ask {
    Ask {
        cancellable: true,
        ..droppable(wait)
    }
}

const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

fn inside(depth: u32) -> Session {
    Session {
        depth: std::num::NonZeroU32::new(depth),
        test_transaction: false,
    }
}

type Held = Hold<String>;

/// A machine may borrow what it is made of, and tests are short.
fn kept<T>(made_of: T) -> &'static T {
    Box::leak(Box::new(made_of))
}

fn machine(ask: Ask) -> Tagged<impl Machine<Output = Option<Held>>> {
    Tagged::new(Mysql::acquire(kept(ask), OUTSIDE).expect("a key and no transaction"))
}

fn acquire(ask: Ask) -> Script<Tagged<impl Machine<Output = Option<Held>>>> {
    play(machine(ask))
}

/// Waits for the lock `report` as an async caller does.
fn wait(wait: Wait) -> Script<Tagged<impl Machine<Output = Option<Held>>>> {
    acquire(droppable(wait))
}

/// A hold of the lock `report`.
fn hold(ask: Ask, session: Session) -> Held {
    let mut machine = Tagged::new(Mysql::acquire(&ask, session).expect("a lock"));
    machine.start(Duration::ZERO);
    match machine.next(value(GRANTED), Duration::ZERO) {
        Step::Done(Ok(Some(hold))) => hold,
        _ => panic!("not granted"),
    }
}

fn release(ask: Ask) -> Script<Tagged<impl Machine<Output = ()>>> {
    play(Tagged::new(Mysql::release(hold(ask, OUTSIDE), OUTSIDE)))
}

fn name() -> Bind {
    Bind::Binary(b"report".to_vec())
}

/// What a conversation about the lock `report` asks next.
trait Asks: Sized {
    fn question(self, text: &str, binds: &[Bind]) -> Self;
    fn requests(self, millis: i64, ends: Option<u32>) -> Self;
    fn tries(self) -> Self;
    fn waits(self) -> Self;
    fn waits_at_most(self, millis: i64) -> Self;
    fn examines(self) -> Self;
    fn gives_back(self) -> Self;
    fn says(self, number: i64) -> Self;
    fn fails_with(self, errno: i64, granted: i64) -> Self;
    fn unclear(self, unclear: &Unclear) -> Self;
}

impl<M: Machine<Output: Debug>> Asks for Script<M> {
    /// The statement has this text and, behind its tag, these binds.
    #[track_caller]
    fn question(self, text: &str, binds: &[Bind]) -> Self {
        assert_eq!(self.statement().text(), text);
        let is_tag = |bind: &Bind| matches!(bind, Bind::BigInt(_));
        let mut behind_tag: Vec<_> = self.statement().binds.iter().cloned().collect();
        if behind_tag.first().is_some_and(is_tag) {
            behind_tag.remove(0);
        }
        assert_eq!(behind_tag, binds);
        self
    }

    /// Waits so many milliseconds. MySQL ends the wait after `ends`.
    #[track_caller]
    fn requests(self, millis: i64, ends: Option<u32>) -> Self {
        let millis = Bind::BigInt(millis);
        // An async caller's statement is also its release.
        if self.statement().prepared == Prepared::MysqlDroppable
            || self.statement().text().contains("IF(?, ")
        {
            return self.question(
                &text_of_request(true, ends),
                &[Bind::Integer(0), name(), name(), millis],
            );
        }
        self.question(&text_of_request(false, ends), &[name(), millis])
    }

    #[track_caller]
    fn tries(self) -> Self {
        self.requests(0, None)
    }

    #[track_caller]
    fn waits(self) -> Self {
        self.requests(FOREVER, None)
    }

    #[track_caller]
    fn waits_at_most(self, millis: i64) -> Self {
        let ends = (millis < 1000).then(|| 1 << millis.ilog2());
        self.requests(millis, ends)
    }

    #[track_caller]
    fn examines(self) -> Self {
        assert_eq!(self.statement().columns, Columns::Pair);
        {
            assert_eq!(self.statement().text(), EXAMINE);
            self
        }
    }

    #[track_caller]
    fn gives_back(self) -> Self {
        if self.statement().prepared == Prepared::MysqlDroppable {
            let binds = [Bind::Integer(1), name(), name(), Bind::BigInt(0)];
            return self.question(&text_of_request(true, None), &binds);
        }
        assert_eq!(self.statement().columns, Columns::Affected);
        self.question(RELEASE, &[name()])
    }

    #[track_caller]
    fn says(self, number: i64) -> Self {
        self.answer(value(number))
    }

    /// Answers with an error, and tells its number when asked, and whether the lock is there.
    #[track_caller]
    fn fails_with(self, errno: i64, granted: i64) -> Self {
        self.answer(plain())
            .batch(KEEP_ERRNO)
            .answer(DONE)
            .examines()
            .answer(examined(errno, granted))
    }

    #[track_caller]
    fn unclear(self, unclear: &Unclear) -> Self {
        unclear
            .answers
            .iter()
            .fold(self, |script, answer| script.answer(answer()))
    }
}

trait Acquires {
    fn granted(self);
    fn gives_up(self);
}

impl<M: Machine<Output = Option<Held>>> Acquires for Script<M> {
    #[track_caller]
    fn granted(self) {
        let result = self.ended();
        assert!(matches!(result, Ok(Some(_))), "{result:?}");
    }

    #[track_caller]
    fn gives_up(self) {
        let result = self.ended();
        assert!(matches!(result, Ok(None)), "{result:?}");
    }
}

/// Answers to a request that leave it open whether it was granted. The session is examined next.
struct Unclear {
    answers: &'static [fn() -> Answer],
    /// What it then says of the error.
    errno: Option<i64>,
    reason: Reason,
}

impl Unclear {
    /// The error's number was not kept.
    fn is_silent(&self) -> bool {
        self.answers.len() == 2 && self.answers[1]() != DONE
    }

    /// It may have failed before it asked for the lock.
    fn may_be_refused(&self) -> bool {
        let is_kept = self.answers.len() == 2 && self.errno.is_some();
        let is_told = self.answers.len() == 1 || (is_kept && !self.is_silent());
        self.reason == Reason::Cluster || !is_told
    }

    /// The failure that comes of it.
    fn failure(&self, kind: fn(Reason) -> Failure) -> Failure {
        let failure = kind(self.reason.clone());
        match self.answers[0]() {
            Answer::Error(_) => failure.because(),
            _ => failure,
        }
    }
}

fn unclear_answers() -> Vec<Unclear> {
    const DONE: fn() -> Answer = || script::DONE;
    const NULL: fn() -> Answer = || script::NULL;
    const PLAIN: fn() -> Answer = plain;
    let unclear = |answers, errno, reason| Unclear {
        answers,
        errno,
        reason,
    };
    vec![
        // KILL QUERY on MySQL.
        unclear(&[PLAIN, DONE], Some(1317), Reason::Interrupted),
        unclear(&[PLAIN, DONE], Some(3058), Reason::Deadlock),
        unclear(&[PLAIN, DONE], Some(1213), Reason::Deadlock),
        unclear(&[PLAIN, DONE], Some(1305), Reason::Unsupported),
        unclear(&[PLAIN, DONE], Some(1235), Reason::Unsupported),
        unclear(&[PLAIN, DONE], Some(20105), Reason::Unsupported),
        // Percona XtraDB Cluster refuses GET_LOCK.
        unclear(&[PLAIN, DONE], Some(1105), Reason::Unsupported),
        // The name that a node of a cluster is asked for.
        unclear(&[PLAIN, DONE], Some(1059), Reason::Cluster),
        unclear(&[PLAIN, DONE], Some(1205), Reason::Database),
        unclear(&[PLAIN, DONE], Some(0), Reason::Database),
        unclear(&[PLAIN, DONE], Some(-1), Reason::Database),
        unclear(&[PLAIN, DONE], None, Reason::Database),
        // The number was not kept: what is there is an older error's.
        unclear(&[PLAIN, PLAIN], Some(1317), Reason::Database),
        unclear(&[PLAIN, NULL], Some(3024), Reason::Database),
        unclear(&[DONE], Some(1317), Reason::Database),
        unclear(&[|| value(3)], Some(1317), Reason::Database),
    ]
}

/// What is no answer to the question whether there is a lock.
fn no_answers(errno: Option<i64>) -> [Answer; 4] {
    [plain(), DONE, examined(errno, 2), value(1)]
}

mod trying {
    use super::*;

    #[test]
    fn a_free_lock_takes_one_query() {
        for asks in [asks, droppable, cancellable] {
            for wait in [TRY, poll(None), UNLIMITED, limit(millis(250))] {
                acquire(asks(wait)).says(GRANTED).granted();
            }
        }
    }

    #[test]
    fn a_grant_counts_however_late_it_comes() {
        wait(limit(millis(250)))
            .at(Duration::MAX)
            .says(GRANTED)
            .granted();
    }

    #[test]
    fn a_try_gives_up_at_once() {
        for asks in [asks, droppable] {
            acquire(asks(TRY)).tries().says(TAKEN).gives_up();
        }
    }

    /// The number may be that of another error: it never says that the lock was not granted.
    #[test]
    fn whatever_number_an_error_has_the_session_is_asked_for_the_lock() {
        for errno in (-1..=5_000).chain([i64::MIN, i64::MAX]) {
            let failed = wait(TRY).answer(plain()).answer(DONE).examines();
            let there = failed.answer(examined(errno, 1));
            match errno {
                1059 => there.failed(broken(Reason::Cluster).because()),
                3057 | 4163 => there.failed(broken(Reason::WrongName).because()),
                _ => drop(there.gives_back()),
            }
        }
    }

    /// A try does not wait, so no limit of a statement is its own.
    #[test]
    fn a_try_that_the_server_cut_short_is_a_failure() {
        for errno in TIMEOUTS {
            for trying in [TRY, poll(None), poll(Some(millis(250)))] {
                wait(trying)
                    .tries()
                    .fails_with(errno, 0)
                    .failed(clean(Reason::Database).because());
            }
        }
    }
}

mod polling {
    use super::*;

    #[test]
    fn it_sleeps_and_never_waits_in_the_queue() {
        let mut polling = wait(poll(None));
        for round in 1..=5 {
            polling = polling
                .tries()
                .at(millis(60 * round))
                .says(TAKEN)
                .sleep(millis(50))
                .answer(DONE);
        }
        polling.tries().says(GRANTED).granted();
    }

    #[test]
    fn with_a_limit_it_asks_a_last_time_when_that_is_reached() {
        let polling = || {
            wait(poll(Some(millis(80))))
                .says(TAKEN)
                .sleep(millis(50))
                .at(millis(51))
                .answer(DONE)
                .tries()
                .says(TAKEN)
                .sleep(millis(29))
                .at(millis(80))
                .answer(DONE)
                .tries()
        };
        polling().says(TAKEN).gives_up();
        polling().says(GRANTED).granted();
    }

    #[test]
    fn without_an_interval_it_sleeps_nevertheless() {
        let spin = Wait {
            limit: None,
            poll: Some(Duration::ZERO),
        };
        wait(spin).says(TAKEN).sleep(millis(1));
    }

    #[test]
    fn it_ends_after_a_try_that_failed() {
        for errno in TIMEOUTS {
            wait(poll(None))
                .says(TAKEN)
                .answer(DONE)
                .tries()
                .fails_with(errno, 0)
                .failed(clean(Reason::Database).because());
        }
    }
}

mod waiting {
    use super::*;

    /// Without rows, a request that was killed looks like one that found the lock taken.
    #[test]
    fn a_sync_caller_asks_why_a_wait_ended_early() {
        for (waits, early) in [
            (UNLIMITED, millis(1)),
            (limit(millis(2_500)), millis(1_999)),
        ] {
            let asking = || {
                acquire(asks(waits))
                    .at(early)
                    .says(TAKEN)
                    .question(UNANSWERED, &[])
            };
            asking().says(TAKEN).sleep(PAUSE);
            asking().says(KILLED).failed(clean(Reason::Interrupted));
            for strange in [value(1), value(3), DONE, NULL_PAIR] {
                asking().answer(strange).failed(clean(Reason::Database));
            }
            asking()
                .answer(plain())
                .failed(clean(Reason::Database).because());
            asking().answer(lost()).failed(gone());
            for stale in [NULL, value(1 << 40)] {
                asking().answer(stale).failed(out_of_step());
            }
        }
        acquire(asks(limit(millis(2_500))))
            .at(millis(2_000))
            .says(TAKEN)
            .waits_at_most(500);
        acquire(asks(limit(millis(250))))
            .at(millis(250))
            .says(TAKEN)
            .gives_up();
        acquire(asks(poll(None))).says(TAKEN).sleep(millis(50));
        acquire(asks(TRY)).says(TAKEN).gives_up();
    }

    #[test]
    fn one_statement_tries_and_waits_for_what_is_left_of_the_limit() {
        let longest = Duration::from_millis(i32::MAX as u64);
        for (waits, asked) in [
            (Duration::from_nanos(1), 1),
            (Duration::from_micros(1_001), 2),
            (millis(250), 250),
            (millis(999), 999),
            (millis(1_000), 1_000),
            (millis(60_050), 60_050),
            (longest, i64::from(i32::MAX)),
            (Duration::MAX, i64::from(i32::MAX)),
        ] {
            wait(limit(waits))
                .waits_at_most(asked)
                .says(GRANTED)
                .granted();
        }
    }

    /// The limit of a statement stands in its text, so MySQL waits in pieces that are powers of two.
    #[test]
    fn mysql_waits_under_a_second_in_pieces_whose_number_is_bounded() {
        let mut waiting = wait(limit(millis(1_999))).waits_at_most(1_999);
        let mut passed = 1_000;
        waiting = waiting.at(millis(passed)).says(TAKEN);
        for (left, piece) in [
            (999, 512),
            (487, 256),
            (231, 128),
            (103, 64),
            (39, 32),
            (7, 4),
            (3, 2),
            (1, 1),
        ] {
            assert_eq!(passed + left, 1_999);
            passed += piece;
            waiting = waiting
                .requests(left as i64, Some(piece as u32))
                .at(millis(passed))
                .fails_with(3024, 0);
        }
        waiting.gives_up();
    }

    #[test]
    fn the_number_of_texts_is_bounded() {
        for ask in [asks, droppable] {
            let text = |waits| acquire(ask(limit(millis(waits)))).statement().text();
            let texts: std::collections::BTreeSet<_> = (0..5_000).map(text).collect();
            assert_eq!(texts.len(), 11);
        }
    }

    /// MariaDB says that the lock is taken, MySQL fails with the statement's own limit.
    fn over<M: Machine<Output: Debug>>(script: Script<M>, errno: Option<i64>) -> Script<M> {
        match errno {
            None => script.says(TAKEN),
            Some(errno) => script.fails_with(errno, 0),
        }
    }

    const OVER: [Option<i64>; 3] = [None, Some(3024), Some(1969)];

    #[test]
    fn at_the_limit_and_past_it_the_wait_is_over() {
        for errno in OVER {
            for now in [millis(250), millis(251), Duration::MAX] {
                over(wait(limit(millis(250))).at(now), errno).gives_up();
            }
        }
    }

    #[test]
    fn the_clock_of_the_caller_may_begin_anywhere() {
        let begin = Duration::from_secs(86_400);
        play_at(machine(droppable(limit(millis(250)))), begin)
            .waits_at_most(250)
            .after(millis(128))
            .says(TAKEN)
            .waits_at_most(122)
            .after(millis(122))
            .says(TAKEN)
            .gives_up();
    }

    #[test]
    fn a_wait_that_ends_early_asks_again_after_a_pause() {
        for errno in OVER {
            let early = over(wait(limit(millis(250))).at(millis(127)), errno);
            early.sleep(PAUSE).answer(DONE).waits_at_most(123);
            let early = over(wait(limit(millis(2_500))).at(millis(1_999)), errno);
            early.sleep(PAUSE).answer(DONE).waits_at_most(501);
            let early = over(wait(UNLIMITED).at(millis(999_999_999)), errno);
            early.sleep(PAUSE).answer(DONE).waits();
        }
    }

    #[test]
    fn a_wait_longer_than_one_statement_asks_again_at_once() {
        let longest = Duration::from_millis(i32::MAX as u64);
        for errno in OVER {
            let first = wait(limit(longest + millis(1_500)))
                .waits_at_most(i64::from(i32::MAX))
                .at(longest);
            over(first, errno).waits_at_most(1_500);
            let forever = wait(UNLIMITED)
                .waits()
                .at(Duration::from_secs(1_000_000_000));
            over(forever, errno).waits();
        }
    }

    #[test]
    fn a_grant_just_before_the_statements_own_limit_is_kept() {
        for errno in TIMEOUTS {
            for now in [millis(249), millis(251)] {
                wait(limit(millis(250)))
                    .at(now)
                    .fails_with(errno, 1)
                    .granted();
            }
        }
    }

    #[test]
    fn a_timeout_names_the_holders_where_the_caller_wants_to_know() {
        let waited = || {
            acquire(Ask {
                name_holders: true,
                ..asks(limit(millis(250)))
            })
            .at(millis(250))
            .says(TAKEN)
        };
        let holder = Holder::from_columns(7, None, None, 1, 1, None);
        let timeout = |holders| {
            clean(Reason::Timeout {
                waited: millis(250),
                holders,
            })
        };
        let asked = waited();
        assert_eq!(
            asked.statement().binds.iter().collect::<Vec<_>>(),
            [&name()]
        );
        asked
            .answer(Answer::Rows(Rows::Holders(vec![holder.clone()])))
            .failed(timeout(vec![holder.clone()]));
        waited()
            .answer(plain())
            .answer(Answer::Rows(Rows::Holders(vec![holder.clone()])))
            .failed(timeout(vec![holder]));
        waited()
            .answer(Answer::Rows(Rows::Holders(Vec::new())))
            .answer(plain())
            .failed(timeout(Vec::new()));
        waited().answer(plain()).answer(plain()).failed(Failure {
            aftermath: Aftermath::MarkBroken,
            ..timeout(Vec::new())
        });
        assert_eq!(waited().abandoned(), BROKEN);
    }

    #[test]
    fn a_long_wait_is_cut_once_to_tell_who_has_the_lock() {
        let holder = Holder::from_columns(7, None, None, 1, 1, None);
        let holders = |holders| Answer::Rows(Rows::Holders(holders));
        let told = |waits| telling(cancellable(waits));
        let looking = |waits| {
            acquire(told(waits))
                .waits_at_most(1_000)
                .at(millis(1_000))
                .says(TAKEN)
                .binds(&[name()])
        };
        assert_eq!(looking(UNLIMITED).abandoned(), BROKEN);
        let telling = looking(UNLIMITED)
            .at(millis(1_020))
            .answer(holders(vec![holder.clone()]));
        assert!(matches!(telling.step(), Step::Tell(told) if *told == [holder.clone()]));
        assert_eq!(telling.abandoned(), Abandoned::default());
        let again = telling.answer(DONE).waits();
        assert!(again.abandoned().cancel);
        again
            .at(Duration::from_secs(2_000_000_000))
            .says(TAKEN)
            .waits();
        // The limit counts from the start, and the timeout tells the whole wait.
        let limited = looking(limit(millis(2_500)))
            .at(millis(1_200))
            .answer(holders(vec![holder.clone()]))
            .answer(DONE)
            .waits_at_most(1_300);
        limited.at(millis(2_500)).says(TAKEN).gives_up();
        let waited = |at| {
            acquire(Ask {
                name_holders: true,
                ..told(limit(millis(2_500)))
            })
            .at(millis(1_000))
            .says(TAKEN)
            .at(at)
            .answer(holders(vec![holder.clone()]))
            .answer(DONE)
        };
        let late = Reason::Timeout {
            waited: millis(2_500),
            holders: vec![holder.clone()],
        };
        waited(millis(1_020))
            .waits_at_most(1_480)
            .at(millis(2_500))
            .says(TAKEN)
            .answer(holders(vec![holder.clone()]))
            .failed(clean(late));
        // The answer came after the limit.
        waited(millis(2_600)).tries();
        // Nobody, or nobody can tell.
        looking(UNLIMITED)
            .answer(holders(Vec::new()))
            .answer(holders(Vec::new()))
            .waits();
        looking(UNLIMITED).answer(plain()).answer(plain()).waits();
        looking(UNLIMITED).answer(lost()).failed(gone());
        // Only sessions that wait.
        let waits = Holder::from_columns(9, None, None, 1, 0, None);
        looking(UNLIMITED).answer(holders(vec![waits])).waits();
        acquire(told(limit(millis(2_000)))).waits_at_most(1_000);
        // It need not be told where it is granted or short, or if nobody wants to know.
        acquire(told(UNLIMITED)).says(GRANTED).granted();
        acquire(told(limit(millis(1_999)))).waits_at_most(1_999);
        acquire(told(TRY)).tries();
        acquire(cancellable(UNLIMITED)).waits();
        // A caller that polls has no place in the queue.
        acquire(told(poll(None)))
            .tries()
            .at(millis(990))
            .says(TAKEN)
            .sleep(millis(10))
            .at(millis(1_000))
            .answer(DONE)
            .tries()
            .says(TAKEN)
            .binds(&[name()])
            .answer(holders(vec![holder]))
            .answer(DONE)
            .tries()
            .says(TAKEN)
            .sleep(millis(50));
    }
}

mod failing {
    use super::*;

    #[test]
    fn a_request_that_failed_leaves_nothing_behind() {
        for ask in [asks(TRY), asks(UNLIMITED), droppable(UNLIMITED)] {
            let waiting = || acquire(ask.clone());
            for unclear in unclear_answers() {
                let failed = || waiting().unclear(&unclear).examines();
                failed()
                    .answer(examined(unclear.errno, 0))
                    .failed(unclear.failure(clean));

                let stray = || failed().answer(examined(unclear.errno, 1));
                if unclear.may_be_refused() {
                    stray().failed(unclear.failure(broken));
                    continue;
                }
                assert!(stray().statement().text().contains("RELEASE_LOCK("));
                stray().says(1).failed(unclear.failure(clean));
                for unknown in [value(0), value(2), plain(), DONE] {
                    stray().answer(unknown).failed(unclear.failure(broken));
                }
            }
        }
    }

    /// There is no error for that, and an old error has no meaning.
    #[test]
    fn a_request_that_mariadb_killed_was_not_granted() {
        for waits in [UNLIMITED, limit(millis(250)), TRY, poll(None)] {
            wait(waits).says(KILLED).failed(clean(Reason::Interrupted));
        }
    }

    #[test]
    fn a_session_that_cannot_be_examined_is_ended() {
        for unclear in unclear_answers() {
            for no_answer in no_answers(unclear.errno) {
                let no_answer_is_error = matches!(no_answer, Answer::Error(_));
                let ended = wait(UNLIMITED)
                    .unclear(&unclear)
                    .examines()
                    .answer(no_answer);
                // The engine may know none of this.
                let ended = match unclear.is_silent() && no_answer_is_error {
                    true => ended.batch(ARE_YOU_THERE).answer(plain()),
                    false => ended,
                };
                let Err(failure) = ended.ended() else {
                    panic!("no failure")
                };
                assert_eq!(failure.aftermath, Aftermath::EndSession);
                let reasons = [unclear.reason.clone(), Reason::Database, Reason::Lost];
                assert!(reasons.contains(&failure.reason));
            }
        }
    }

    #[test]
    fn an_engine_that_understands_nothing_has_no_such_locks() {
        let asked = || {
            wait(UNLIMITED)
                .answer(plain())
                .batch(KEEP_ERRNO)
                .answer(plain())
                .examines()
                .answer(plain())
                .batch(ARE_YOU_THERE)
        };
        asked()
            .answer(DONE)
            .failed(broken(Reason::Unsupported).because());
        asked()
            .answer(plain())
            .failed(broken(Reason::Lost).because());
        asked().answer(lost()).failed(gone());
    }

    #[test]
    fn a_session_that_has_gone_holds_nothing() {
        for asked in [
            wait(UNLIMITED),
            wait(UNLIMITED).answer(plain()).batch(KEEP_ERRNO),
            wait(UNLIMITED).answer(plain()).answer(DONE).examines(),
            wait(UNLIMITED).fails_with(1317, 1).gives_back(),
        ] {
            asked.answer(lost()).failed(gone());
        }
        release(asks(TRY)).answer(lost()).failed(gone());
    }
}

mod clusters {
    use super::*;

    /// The statement asks whether this is a node of a cluster.
    const ASKS: &str = "@@wsrep_on";

    #[test]
    fn a_mariadb_without_galera_is_asked_again_without_that_question_and_never_again() {
        for ask in [
            asks(UNLIMITED),
            droppable(UNLIMITED),
            asks(TRY),
            droppable(limit(millis(250))),
        ] {
            let first = acquire(ask);
            let millis_of = |statement: &Statement| statement.binds.iter().last().cloned();
            let asked = millis_of(first.statement());
            assert!(first.statement().text().contains(ASKS));
            let again = first.fails_with(1193, 0);
            assert!(!again.statement().text().contains(ASKS));
            assert!(again.statement().text().contains("GET_LOCK"));
            assert_eq!(again.statement().prepared, Prepared::ByText);
            assert_eq!(millis_of(again.statement()), asked);
            again.fails_with(1193, 0).failed(Failure {
                aftermath: Aftermath::Clean,
                ..clean(Reason::UnknownVariable).because()
            });
        }
    }

    #[test]
    fn what_such_a_server_granted_is_released_without_that_question() {
        let mut machine = machine(droppable(TRY));
        machine.start(Duration::ZERO);
        let answers = [plain(), DONE, examined(1193, 0), value(GRANTED)];
        let mut step = None;
        for answer in answers {
            step = Some(machine.next(answer, Duration::ZERO));
        }
        let Some(Step::Done(Ok(Some(hold)))) = step else {
            panic!("not granted")
        };
        let release = play(Mysql::release(hold, OUTSIDE));
        assert_eq!(release.statement().text(), RELEASE);
    }

    #[test]
    fn a_lock_that_is_there_is_given_back_all_the_same() {
        wait(UNLIMITED).fails_with(1193, 1).gives_back();
    }

    #[test]
    fn what_was_taken_without_that_question_is_given_back_without_it() {
        let again = acquire(droppable(UNLIMITED)).fails_with(1193, 0);
        let given_back = again.fails_with(1317, 1);
        assert_eq!(given_back.statement().text(), RELEASE);
        given_back
            .says(1)
            .failed(clean(Reason::Interrupted).because());
    }

    /// The request may have failed before it asked for the lock, or that number is an older error's.
    #[test]
    fn a_lock_that_may_be_an_outer_guards_is_not_released() {
        for asks in [asks, droppable, cancellable] {
            for (errno, reason) in [
                (1059, Reason::Cluster),
                (3057, Reason::WrongName),
                (4163, Reason::WrongName),
            ] {
                acquire(asks(UNLIMITED))
                    .fails_with(errno, 1)
                    .failed(broken(reason).because());
            }
            acquire(asks(UNLIMITED))
                .answer(plain())
                .answer(plain())
                .examines()
                .answer(examined(4163, 1))
                .failed(broken(Reason::Database).because());
        }
    }

    /// MySQL 8 and MySQL 9.7 refuse the name that stands for the question with different numbers.
    const REFUSED: [i64; 2] = [3057, 4163];

    fn may_be_one_of_several(ask: Ask, errno: i64) -> Script<impl Machine<Output = Option<Held>>> {
        let script = acquire(ask).fails_with(errno, 0);
        let text = script.statement().text();
        assert!(
            text.contains("performance_schema.global_variables")
                && text.contains("group_replication_single_primary_mode"),
            "{text}"
        );
        script
    }

    #[test]
    fn one_of_several_writers_takes_no_lock() {
        for ask in [asks, droppable, cancellable] {
            for (errno, wait) in REFUSED.into_iter().zip([TRY, UNLIMITED]) {
                may_be_one_of_several(ask(wait), errno)
                    .says(1)
                    .failed(clean(Reason::Cluster).because());
            }
        }
    }

    #[test]
    fn a_mysql_that_only_looks_like_one_of_several_writers_is_asked_again_within_what_is_left() {
        for ask in [asks, droppable] {
            may_be_one_of_several(ask(limit(millis(5000))), 4163)
                .at(millis(1000))
                .says(0)
                .waits_at_most(4000)
                .says(GRANTED)
                .granted();
        }
        // Now the name itself is refused, and nobody is asked in a circle.
        may_be_one_of_several(asks(TRY), 3057)
            .says(0)
            .tries()
            .fails_with(3057, 0)
            .failed(clean(Reason::WrongName).because());
    }

    #[test]
    fn a_mysql_that_does_not_answer_whether_it_is_one_takes_none() {
        for answer in [plain, || NULL_PAIR, || DONE] {
            may_be_one_of_several(droppable(TRY), 4163)
                .answer(answer())
                .answer(answer())
                .failed(clean(Reason::Cluster).because());
        }
    }

    /// Otherwise one of several writers would take a lock.
    #[test]
    fn a_question_that_was_killed_is_asked_once_more() {
        for ask in [asks, droppable] {
            let killed = may_be_one_of_several(ask(TRY), 4163).answer(plain());
            let text = killed.statement().text();
            assert!(
                text.contains("performance_schema.global_variables"),
                "{text}"
            );
            killed.says(1).failed(clean(Reason::Cluster).because());
        }
    }

    #[test]
    fn an_answer_to_an_earlier_question_is_not_taken_for_that() {
        may_be_one_of_several(droppable(TRY), 4163)
            .answer(NULL)
            .failed(out_of_step());
        may_be_one_of_several(droppable(TRY), 4163)
            .answer(lost())
            .failed(gone());
    }
}

mod releasing {
    use super::*;

    #[test]
    fn one_hold_is_released_by_one_query() {
        assert_eq!(release(asks(TRY)).gives_back().says(1).ended(), Ok(()));
    }

    #[test]
    fn a_lock_of_another_session_or_of_nobody_was_lost() {
        for ask in [asks(TRY), droppable(TRY)] {
            release(ask).says(0).failed(Failure {
                reason: Reason::NotHeld,
                aftermath: Aftermath::MarkBroken,
                cause: Cause::default(),
                key: None,
            });
        }
    }

    #[test]
    fn anything_else_ends_the_session() {
        for ask in [asks(TRY), droppable(TRY)] {
            release(ask.clone())
                .answer(plain())
                .failed(broken(Reason::Database).because());
            for answer in [DONE, value(2)] {
                release(ask.clone())
                    .answer(answer)
                    .failed(broken(Reason::Database));
            }
        }
    }

    #[test]
    fn an_async_caller_releases_by_the_statement_that_its_driver_has_prepared() {
        let trying = acquire(droppable(TRY)).tries();
        let binds = [Bind::Integer(1), name(), name(), Bind::BigInt(0)];
        let release = release(droppable(TRY)).question(&text_of_request(true, None), &binds);
        for asked in [trying.statement(), release.statement()] {
            assert_eq!(asked.prepared, Prepared::MysqlDroppable);
        }
        assert_eq!(trying.statement().text(), release.statement().text());
        assert_eq!(release.says(1).ended(), Ok(()));
    }

    /// To release once more could take an outer guard's hold.
    #[test]
    fn nothing_is_sent_behind_it() {
        assert_eq!(release(droppable(TRY)).abandoned(), BROKEN);
    }
}

mod asking {
    use super::*;

    fn is_held(ask: Ask) -> Script<Tagged<impl Machine<Output = bool>>> {
        play(Tagged::new(Mysql::is_held(kept(hold(ask, OUTSIDE)))))
    }

    #[test]
    fn whether_the_lock_is_held() {
        type Case = (fn(Wait) -> Ask, &'static str, fn(Reason) -> Failure);
        // A connection on which futures are dropped may give the error of an earlier question.
        let cases: [Case; 2] = [
            (asks, IS_HELD, clean),
            (droppable, IS_HELD_TAGGED, marked_broken),
        ];
        for (ask, text, kind) in cases {
            let is_held = || is_held(ask(TRY)).question(text, &[name()]);
            assert_eq!(is_held().says(1).ended(), Ok(true));
            assert_eq!(is_held().says(0).ended(), Ok(false));
            is_held()
                .answer(plain())
                .failed(kind(Reason::Database).because());
            is_held().answer(lost()).failed(gone());
            assert_eq!(is_held().abandoned(), BROKEN);
        }
        for stale in [NULL, value(1 << 40)] {
            is_held(droppable(TRY)).answer(stale).failed(out_of_step());
        }
    }

    #[test]
    fn who_holds_the_lock() {
        let holders = || play(Mysql::holders(kept(LockKey::from("report"))).expect("a key"));
        let holder = Holder::from_columns(7, None, None, 1, 1, None);
        let rows = |rows| Answer::Rows(Rows::Holders(rows));
        let one = vec![holder.clone()];
        assert!(
            holders()
                .statement()
                .text()
                .contains("performance_schema.metadata_locks")
        );
        assert_eq!(holders().answer(rows(one.clone())).ended(), Ok(one.clone()));
        // While the lock changes hands, the server may list the holder before and the one after.
        let after = Holder::from_columns(8, None, None, 1, 1, None);
        let both = vec![holder.clone(), after];
        for less in [plain(), rows(Vec::new()), rows(both.clone())] {
            let second = || holders().answer(less.clone());
            assert!(second().statement().text().contains("IS_USED_LOCK"));
            assert_eq!(second().answer(rows(one.clone())).ended(), Ok(one.clone()));
            assert_eq!(second().answer(rows(Vec::new())).ended(), Ok(Vec::new()));
        }
        let nobody_tells = holders().answer(plain()).answer(plain());
        nobody_tells.failed(marked_broken(Reason::Database).because());
        let nothing_else = holders().answer(rows(both)).answer(plain()).ended();
        assert_eq!(nothing_else.map(|holders| holders.len()), Ok(2));
        let waits = Holder::from_columns(9, None, None, 1, 0, None);
        let queue = vec![holder, waits];
        assert_eq!(holders().answer(rows(queue.clone())).ended(), Ok(queue));
        assert_eq!(holders().abandoned(), BROKEN);
        assert_eq!(holders().answer(plain()).abandoned(), BROKEN);
    }
}

const BROKEN: Abandoned = Abandoned {
    messages: Vec::new(),
    broken: true,
    cancel: false,
    requests: Vec::new(),
};

/// Nobody waits for the answer any more, which the next question would be given.
mod abandoning {
    use super::*;

    /// What the last request may have left is released.
    fn reclaim(request: i64) -> String {
        format!(
            "SET @dlock_request = IF(@dlock_request <=> {request} \
             AND IS_USED_LOCK({REPORT}) <=> CONNECTION_ID(), \
             0 * RELEASE_LOCK({REPORT}), @dlock_request)"
        )
    }

    fn reclaims(request: i64) -> Abandoned {
        Abandoned {
            messages: vec![reclaim(request).into()],
            ..BROKEN
        }
    }

    #[test]
    fn a_wait_is_cancelled_and_released_even_if_the_cancel_hits_the_release() {
        for wait in [UNLIMITED, limit(millis(250)), limit(millis(2_500))] {
            let waiting = acquire(cancellable(wait));
            let message = reclaim(tag(waiting.statement()));
            assert_eq!(
                waiting.abandoned(),
                Abandoned {
                    messages: vec![message.clone().into(), message.into()],
                    broken: true,
                    cancel: true,
                    requests: Vec::new(),
                }
            );
        }
    }

    /// While there is a message to read, the server does not notice that the connection is closed.
    #[test]
    fn a_wait_that_nobody_cancels_has_no_message_behind_it() {
        for wait in [UNLIMITED, limit(millis(250)), limit(millis(2_500))] {
            assert_eq!(
                acquire(droppable(wait)).abandoned(),
                Abandoned {
                    cancel: true,
                    ..BROKEN
                }
            );
        }
    }

    #[test]
    fn what_does_not_wait_is_released_by_one_message() {
        for ask in [droppable, cancellable] {
            let trying = acquire(ask(TRY));
            assert_eq!(trying.abandoned(), reclaims(tag(trying.statement())));

            let waiting = || acquire(ask(UNLIMITED));
            let request = waiting().answer(plain());
            let request_tag = |abandoned: &Abandoned| {
                let message = abandoned.messages[0].to_string();
                let start = message.find("<=> ").expect("a request") + 4;
                let digits: String = message[start..]
                    .chars()
                    .take_while(char::is_ascii_digit)
                    .collect();
                digits.parse::<i64>().expect("a number")
            };
            let abandoned = request.batch(KEEP_ERRNO).abandoned();
            assert_eq!(abandoned, reclaims(request_tag(&abandoned)));

            let examining = waiting().answer(plain()).answer(DONE).examines();
            let Some(Bind::BigInt(examined_request)) = examining.statement().binds.iter().nth(1)
            else {
                panic!("no request");
            };
            assert_eq!(examining.abandoned(), reclaims(*examined_request));

            let abandoned = waiting().fails_with(1317, 1).abandoned();
            assert_eq!(abandoned, reclaims(request_tag(&abandoned)));
        }
    }

    #[test]
    fn a_sleep_leaves_nothing_behind() {
        for sleeping in [
            acquire(droppable(poll(None))).says(TAKEN).sleep(millis(50)),
            acquire(droppable(UNLIMITED)).says(TAKEN).sleep(PAUSE),
        ] {
            assert_eq!(sleeping.abandoned(), Abandoned::default());
        }
    }

    #[test]
    fn a_caller_that_cannot_drop_it_has_nothing_to_send() {
        let trying = || acquire(asks(TRY));
        assert_eq!(trying().abandoned(), BROKEN);
        assert_eq!(trying().answer(plain()).abandoned(), BROKEN);
    }
}

/// A guard is dropped.
mod parting {
    use super::*;

    fn part(hold: &Held, session: Option<Session>) -> Option<String> {
        let Parting {
            message,
            broken,
            request,
            ..
        } = Mysql::part(hold, session);
        assert!(
            broken,
            "an answer that nobody reads puts the connection out of step"
        );
        assert_eq!(request, None);
        message
    }

    #[test]
    fn a_hold_is_given_up_in_one_message() {
        let release = format!("DO RELEASE_LOCK({REPORT})");
        let outside = hold(droppable(TRY), OUTSIDE);
        assert_eq!(part(&outside, Some(OUTSIDE)), Some(release.clone()));
        let open = inside(1);
        assert_eq!(
            part(&outside, Some(open)),
            Some(format!("ROLLBACK; {release}"))
        );

        let ask = Ask {
            inside_transaction: true,
            ..droppable(TRY)
        };
        let nested = hold(ask, open);
        assert_eq!(nested.depth(), open.depth);
        for session in [OUTSIDE, open, inside(2)] {
            assert_eq!(part(&nested, Some(session)), Some(release.clone()));
        }
    }

    /// A wait may have been dropped on it, which ends when the connection is closed.
    #[test]
    fn nothing_is_sent_on_a_broken_connection() {
        assert_eq!(part(&hold(droppable(TRY), OUTSIDE), None), None);
    }

    #[test]
    fn names_in_text_are_hexadecimal() {
        let key = LockKey::from("it's \\ a `name`");
        let hold = hold(
            Ask {
                key,
                ..droppable(TRY)
            },
            OUTSIDE,
        );
        let message = part(&hold, Some(OUTSIDE)).expect("a message");
        let hex = message
            .strip_prefix("DO RELEASE_LOCK(CONVERT(x'")
            .and_then(|rest| rest.strip_suffix("' USING utf8mb4))"))
            .expect("a name");
        assert!(
            hex.len() > 10 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{hex}"
        );
    }
}

mod refusing {
    use super::*;

    #[test]
    fn a_sessions_lock_in_a_transaction() {
        let refused = |ask: &Ask, session| Mysql::acquire(ask, session).err();
        let in_transaction = clean(Reason::InTransaction);
        assert_eq!(refused(&asks(TRY), inside(1)), Some(in_transaction));
        let allowed = Ask {
            inside_transaction: true,
            ..asks(TRY)
        };
        assert_eq!(refused(&allowed, inside(1)), None);
        let test = Session {
            test_transaction: true,
            ..inside(1)
        };
        assert_eq!(refused(&asks(TRY), test), None);
        assert_eq!(refused(&asks(TRY), OUTSIDE), None);
    }

    #[test]
    fn holds_are_exclusive() {
        assert_eq!(hold(asks(TRY), OUTSIDE).mode(), Mode::Exclusive);
    }
}

/// The answer to another question is never believed.
mod out_of_step {
    use super::*;

    const STALE: [i64; 6] = [10, -1, 1 << 20, -(1 << 40), i64::MIN, -BASE];

    #[test]
    fn it_ends_the_session_wherever_it_is_noticed() {
        for stale in STALE.map(Some).into_iter().chain([None]) {
            let number = Answer::Rows(Rows::Number(stale));
            for asked in [
                wait(UNLIMITED),
                wait(poll(None)).says(TAKEN).answer(DONE),
                wait(UNLIMITED).fails_with(1317, 1).gives_back(),
            ] {
                asked.answer(number.clone()).failed(out_of_step());
            }
            release(droppable(TRY)).answer(number).failed(out_of_step());
            let examining = wait(UNLIMITED).answer(plain()).answer(DONE).examines();
            examining
                .answer(Answer::Rows(Rows::Pair(Some(1317), stale)))
                .failed(out_of_step());
        }
    }

    /// Without what this file adds to answers.
    #[test]
    fn an_answer_without_the_tag_is_stale() {
        for number in [-1, 0, 1, 2, BASE, BASE + 1, i64::MIN, i64::MAX] {
            let mut machine = Mysql::acquire(kept(droppable(TRY)), OUTSIDE).expect("a lock");
            machine.start(Duration::ZERO);
            let step = machine.next(value(number), Duration::ZERO);
            assert!(
                matches!(step, Step::Done(Err(failure)) if failure == out_of_step()),
                "{number}"
            );
        }
    }

    #[test]
    fn every_question_about_a_lock_has_a_tag_of_its_own() {
        let mut tags = std::collections::BTreeSet::new();
        for asked in [
            wait(UNLIMITED),
            wait(poll(None)).says(TAKEN).answer(DONE),
            wait(limit(millis(250))),
            wait(UNLIMITED).answer(plain()).answer(DONE),
            wait(UNLIMITED).fails_with(1317, 1),
        ] {
            assert!(tags.insert(tag(asked.statement())));
        }
        assert!(tags.insert(tag(release(droppable(TRY)).statement())));
        let hold = hold(droppable(TRY), OUTSIDE);
        assert!(tags.insert(tag(play(Mysql::is_held(kept(hold))).statement())));
        let tags: Vec<_> = tags.into_iter().collect();
        assert!(tags.iter().all(|tag| (1..1 << 61).contains(tag)));
        assert!(
            tags.windows(2).all(|pair| pair[1] - pair[0] >= 256),
            "{tags:?}"
        );
    }

    #[test]
    fn the_session_is_examined_for_the_request_that_failed() {
        let asked = wait(poll(None)).says(TAKEN).answer(DONE);
        let request = tag(asked.statement());
        let examining = asked.answer(plain()).answer(DONE);
        examining.question(EXAMINE, &[Bind::BigInt(request), name()]);
    }
}

/// What the statements carry.
mod sent {
    use super::*;

    /// Every query with the key's name that the machines can send.
    fn queries(key: &LockKey, mode: Mode, droppable: bool) -> Vec<Statement> {
        let ask = |wait| Ask {
            key: key.clone(),
            mode,
            droppable,
            ..asks(wait)
        };
        let acquire = |wait| acquire(ask(wait));
        let hold = || hold(ask(TRY), OUTSIDE);
        let mut statements = vec![
            acquire(TRY).statement().clone(),
            acquire(UNLIMITED).statement().clone(),
            acquire(limit(millis(1_500))).statement().clone(),
            acquire(limit(millis(250))).statement().clone(),
            acquire(TRY)
                .answer(plain())
                .answer(DONE)
                .statement()
                .clone(),
            acquire(TRY).fails_with(1317, 1).statement().clone(),
            play(Mysql::release(hold(), OUTSIDE)).statement().clone(),
            play(Mysql::is_held(kept(hold()))).statement().clone(),
        ];
        let holders = || play(Mysql::holders(key).expect("a key"));
        statements.push(holders().statement().clone());
        statements.push(holders().answer(plain()).statement().clone());
        statements
    }

    #[test]
    fn the_name_travels_as_bytes_and_never_in_the_text() {
        for droppable in [false, true] {
            for key in [
                LockKey::from("report"),
                LockKey::from("it's; drop table accounts; --"),
                LockKey::from("ÜSER/001"),
                LockKey::from(b"\x00\xff"),
                LockKey::from(i64::MIN),
                LockKey::from((-1, i32::MIN)),
                LockKey::namespaced("*/ KILL 1; /*", "?"),
            ] {
                let others = queries(&LockKey::from("other"), Mode::Exclusive, droppable);
                let statements = queries(&key, Mode::Exclusive, droppable);
                let is_name = |bind: &&Bind| matches!(bind, Bind::Binary(_));
                let first = statements[0]
                    .binds
                    .iter()
                    .find(is_name)
                    .cloned()
                    .expect("a name");
                for (statement, other) in statements.iter().zip(others) {
                    assert_eq!(statement.text(), other.text());
                    let names: Vec<_> = statement.binds.iter().filter(is_name).collect();
                    assert!(!names.is_empty() && names.iter().all(|name| **name == first));
                }
            }
        }
    }

    #[test]
    fn modes_change_nothing() {
        let key = LockKey::from("report");
        let texts = |mode| -> Vec<_> {
            queries(&key, mode, false)
                .iter()
                .map(Statement::text)
                .collect()
        };
        assert_eq!(texts(Mode::Shared), texts(Mode::Exclusive));
    }

    /// After KILL QUERY libmariadb hangs when it executes a kept statement again that has begun to answer with rows.
    #[test]
    fn what_a_sync_caller_keeps_has_no_rows_or_ends_the_session_if_it_fails() {
        for statement in queries(&LockKey::from("report"), Mode::Exclusive, false) {
            let text = statement.text();
            let forgotten = statement.prepared == Prepared::Never;
            assert!(
                forgotten || statement.columns == Columns::Affected || text == EXAMINE,
                "{text}"
            );
        }
    }

    #[test]
    fn a_colon_is_no_bind_to_mysql_async() {
        for statement in queries(&LockKey::from("report"), Mode::Exclusive, true) {
            let text = statement.text();
            for (at, _) in text.match_indices(':') {
                assert!(
                    [Some(" "), Some("=")].contains(&text.get(at + 1..at + 2)),
                    "{text}"
                );
            }
        }
    }
}

/// Every conversation with a session that grants, refuses, is killed or ends at any moment, and every way to abandon
/// it.
mod against_a_model {
    use script::Log;

    use super::*;

    /// A session of a server, as far as it matters.
    #[derive(Clone, Debug)]
    struct Model {
        alive: bool,
        /// How often it holds the lock. An outer guard may have one of these holds.
        holds: u32,
        outer: u32,
        /// Another session may get the lock in between.
        request: i64,
        /// What it said of the last request.
        said: i64,
        /// The number of the last error, and the one that is kept.
        errno: Option<i64>,
        kept: Option<i64>,
        /// The last request failed before it asked for the lock.
        refused: bool,
        /// How much went wrong.
        faults: u32,
        strange: bool,
    }

    /// What can come of a statement.
    type Outcomes = Vec<(Answer, Model)>;

    const INTERRUPTED: i64 = 1317;

    fn integer(bind: Option<&Bind>) -> i64 {
        match bind {
            Some(Bind::BigInt(number)) => *number,
            Some(Bind::Integer(number)) => i64::from(*number),
            other => panic!("no number: {other:?}"),
        }
    }

    impl Model {
        fn new(outer: u32) -> Self {
            Model {
                alive: true,
                holds: outer,
                outer,
                request: 0,
                said: 0,
                errno: None,
                kept: None,
                refused: false,
                faults: 0,
                strange: false,
            }
        }

        fn with(&self, change: impl FnOnce(&mut Model)) -> Model {
            let mut model = self.clone();
            change(&mut model);
            model
        }

        fn fails(&self, errno: i64) -> (Answer, Model) {
            let failed = self.with(|model| {
                model.errno = Some(errno);
                model.faults += 1;
            });
            (plain(), failed)
        }

        fn ends(&self) -> (Answer, Model) {
            let ended = self.with(|model| {
                model.alive = false;
                model.holds = 0;
                model.faults += 1;
            });
            (lost(), ended)
        }

        /// It is obeyed, but the answer is another one's.
        fn is_out_of_step(&self, pair: bool) -> (Answer, Model) {
            let stale = Some(1 << 30);
            let answer = match pair {
                true => Rows::Pair(Some(1), stale),
                false => Rows::Number(stale),
            };
            (
                Answer::Rows(answer),
                self.with(|model| model.strange = true),
            )
        }

        fn outcomes<T>(&self, step: &Step<T>) -> Outcomes {
            match step {
                Step::Query(statement) => {
                    let text = statement.text();
                    let binds: Vec<_> = statement.binds.iter().collect();
                    let mut outcomes = if statement.columns == Columns::Holders {
                        self.holders()
                    } else if text == EXAMINE {
                        self.examine(integer(Some(binds[1])))
                    } else if text == RELEASE {
                        self.release(None)
                    } else if text == UNANSWERED {
                        self.say_again()
                    } else if text.contains("performance_schema.global_variables") {
                        self.writers()
                    } else if text.contains("IF(?, ") && integer(Some(binds[1])) == 1 {
                        self.release(Some(tag(statement)))
                    } else {
                        assert!(text.contains("GET_LOCK("), "{text}");
                        let mut outcomes =
                            self.get_lock(tag(statement), integer(binds.last().copied()));
                        if text.contains("@dlock_one_node") {
                            outcomes.push(self.refuses_the_name(tag(statement)));
                        }
                        outcomes
                    };
                    if !is_tagged(statement) {
                        outcomes.retain(|(_, model)| !model.strange);
                        for (answer, _) in &mut outcomes {
                            if *answer == value(KILLED) {
                                *answer = value(TAKEN);
                            }
                        }
                    }
                    outcomes
                }
                Step::Batch(text) => self.batch(text),
                Step::Sleep(_) | Step::Tell(_) => vec![(DONE, self.clone())],
                Step::Done(_) => unreachable!(),
            }
        }

        fn get_lock(&self, request: i64, millis: i64) -> Outcomes {
            let asked = self.with(|model| {
                model.request = request;
                model.refused = false;
            });
            let granted = asked.with(|model| model.holds += 1);
            let mut outcomes = vec![
                (value(GRANTED), granted.clone()),
                // A cancel comes early, or as the lock is granted, or the session ends.
                self.fails(INTERRUPTED),
                granted.fails(INTERRUPTED),
                granted.ends(),
                granted.is_out_of_step(false),
            ];
            // A session never waits for what it holds.
            if self.holds == 0 {
                outcomes.push((value(TAKEN), asked.with(|model| model.said = TAKEN)));
                if millis > 0 {
                    outcomes.push(asked.fails(INTERRUPTED));
                    outcomes.push(asked.fails(3058));
                    let killed = asked.with(|model| {
                        model.said = KILLED;
                        model.faults += 1;
                    });
                    outcomes.push((value(KILLED), killed));
                    outcomes.push(asked.fails(3024));
                    outcomes.push(granted.fails(3024));
                }
            }
            outcomes
        }

        fn release(&self, request: Option<i64>) -> Outcomes {
            let asked = self.with(|model| model.request = request.unwrap_or(model.request));
            let released = asked.with(|model| model.holds = model.holds.saturating_sub(1));
            vec![
                (value(i64::from(self.holds > 0)), released.clone()),
                self.fails(INTERRUPTED),
                released.fails(INTERRUPTED),
                released.ends(),
                released.is_out_of_step(false),
            ]
        }

        /// Nobody knows whose an error is, or an answer of another form.
        fn holders(&self) -> Outcomes {
            let holder = Holder::from_columns(7, None, None, 1, 1, None);
            vec![
                (Answer::Rows(Rows::Holders(vec![holder])), self.clone()),
                (Answer::Rows(Rows::Holders(Vec::new())), self.clone()),
                self.fails(INTERRUPTED),
                self.ends(),
            ]
        }

        /// It may be one of several servers. That it is not so before an outer guard, but then, is a fault of its own.
        fn refuses_the_name(&self, request: i64) -> (Answer, Model) {
            let asked = self.with(|model| {
                model.request = request;
                model.refused = true;
                model.faults += u32::from(model.holds > 0);
            });
            asked.fails(4163)
        }

        fn writers(&self) -> Outcomes {
            vec![
                (value(0), self.clone()),
                (value(1), self.clone()),
                self.fails(INTERRUPTED),
                self.ends(),
                self.is_out_of_step(false),
            ]
        }

        fn say_again(&self) -> Outcomes {
            vec![
                (value(self.said), self.clone()),
                self.fails(INTERRUPTED),
                self.ends(),
                self.is_out_of_step(false),
            ]
        }

        fn examine(&self, request: i64) -> Outcomes {
            let granted = self.request == request && self.holds > 0;
            vec![
                (examined(self.kept, i64::from(granted)), self.clone()),
                self.fails(INTERRUPTED),
                self.ends(),
                self.is_out_of_step(true),
            ]
        }

        fn batch(&self, text: &str) -> Outcomes {
            if text == ARE_YOU_THERE {
                return vec![(DONE, self.clone()), self.fails(INTERRUPTED), self.ends()];
            }
            assert_eq!(text, KEEP_ERRNO);
            let done = self.with(|model| model.kept = model.errno);
            vec![(DONE, done.clone()), self.fails(INTERRUPTED), done.ends()]
        }

        /// It reads a message whose answer nobody reads.
        fn reads(&mut self, message: &str) {
            let name = REPORT;
            if message == "KILL CONNECTION_ID()" {
                self.alive = false;
                return;
            }
            if let Some(message) =
                message.strip_prefix("SET @dlock_request = IF(@dlock_request <=> ")
            {
                let (request, rest) = message.split_once(' ').expect("a number");
                assert_eq!(
                    rest,
                    format!(
                        "AND IS_USED_LOCK({name}) <=> CONNECTION_ID(), 0 * RELEASE_LOCK({name}), @dlock_request)"
                    )
                );
                if self.request == request.parse::<i64>().expect("a number") && self.holds > 0 {
                    self.holds -= 1;
                    self.request = 0;
                }
                return;
            }
            let release = message.strip_prefix("ROLLBACK; ").unwrap_or(message);
            assert_eq!(release, format!("DO RELEASE_LOCK({name})"));
            self.holds = self.holds.saturating_sub(1);
        }
    }

    fn waits<T>(step: &Step<T>) -> bool {
        let Step::Query(statement) = step else {
            return false;
        };
        let is_request = statement.text().contains("GET_LOCK(");
        let last = statement.binds.iter().last();
        is_request && integer(last) > 0
    }

    /// Nobody reads the answer to this step.
    fn check_abandoned<T>(model: &Model, step: &Step<T>, abandoned: &Abandoned, cancellable: bool) {
        if !abandoned.broken {
            assert!(
                matches!(step, Step::Sleep(_) | Step::Tell(_)),
                "out of step"
            );
            assert_eq!(*abandoned, Abandoned::default());
            assert_eq!(model.holds, model.outer, "leaves a lock");
            return;
        }
        if let Step::Query(statement) = step {
            assert_eq!(abandoned.cancel, waits(step), "{statement:?}");
            if waits(step) && !cancellable {
                assert_eq!(
                    abandoned.messages.len(),
                    0,
                    "hides that the connection is closed"
                );
                return;
            }
        }
        for (answer, after) in model.outcomes(step) {
            // The messages are read one after the other, and a cancel hits one of them or none.
            let hits = if abandoned.cancel {
                abandoned.messages.len()
            } else {
                0
            };
            let by_the_cancel = matches!(answer, Answer::Error(_));
            for hit in 0..=hits {
                if hit > 0 && by_the_cancel {
                    continue;
                }
                let mut after = after.clone();
                for (at, message) in abandoned.messages.iter().enumerate() {
                    if at + 1 != hit && after.alive {
                        after.reads(message);
                    }
                }
                // An outer guard's hold may go before the session that is broken does.
                if after.alive && !(after.refused && after.holds < after.outer) {
                    assert_eq!(after.holds, after.outer, "after {answer:?}, hit {hit}");
                }
            }
        }
    }

    struct Setting {
        ask: Ask,
        outer: u32,
        /// How long each answer takes.
        pace: Duration,
    }

    /// Holds one conversation, in which each answer is the chosen one of those that can be. Returns how many there were
    /// to choose from where the choices end.
    fn converse(setting: &Setting, choices: &[usize]) -> usize {
        let Setting { ask, outer, pace } = setting;
        let mut log = Log::default();
        let mut model = Model::new(*outer);
        let mut choices = choices.iter();
        let mut now = Duration::ZERO;
        let acquire = Mysql::acquire(ask, OUTSIDE).expect("a lock");
        // As the drivers hold it.
        let mut machine = Tagged::new(StillThere::<Mysql, _>::new(acquire));
        let mut step = machine.start(now);
        loop {
            log.step(&step);
            if let Step::Done(result) = step {
                check_end(&model, result, ask, now);
                return 0;
            }
            if !matches!(step, Step::Query(_) | Step::Batch(_)) {
                assert_eq!(model.holds, model.outer, "sleeps with the lock");
            }
            if ask.wait.poll.is_some() {
                assert!(!waits(&step), "waits in the queue");
            }
            if ask.droppable {
                check_abandoned(&model, &step, &machine.abandon(), ask.cancellable);
            }
            let mut outcomes = model.outcomes(&step);
            let Some(choice) = choices.next() else {
                return outcomes.len();
            };
            let (answer, after) = outcomes.swap_remove(*choice);
            assert!(
                after.holds >= after.outer || !after.alive,
                "takes an outer guard's hold"
            );
            log.answer(&answer);
            model = after;
            now += *pace;
            step = machine.next(answer, now);
        }
    }

    fn check_end(model: &Model, result: Result<Option<Held>, Failure>, ask: &Ask, now: Duration) {
        let kept = match result {
            Ok(Some(hold)) => {
                check_parted(model, &hold);
                1
            }
            Ok(None) => {
                assert!(now >= ask.wait.limit.expect("a limit"), "gives up early");
                0
            }
            Err(Failure {
                aftermath: Aftermath::Clean,
                ..
            }) => 0,
            Err(Failure {
                aftermath: Aftermath::MarkBroken,
                ..
            }) => {
                // Or it did not answer the question whether it is there.
                let unavoidable = !model.alive || model.faults > 1;
                assert!(unavoidable, "it is the session that it was");
                return;
            }
            Err(failure) => {
                let expected = match failure.reason {
                    Reason::OutOfStep => Aftermath::EndSessionUnread,
                    _ => Aftermath::EndSession,
                };
                assert_eq!(failure.aftermath, expected);
                assert_eq!(failure.reason == Reason::OutOfStep, model.strange);
                let unavoidable = model.strange || model.faults > 1;
                assert!(unavoidable, "a request that fails once ends the session");
                return;
            }
        };
        assert!(model.alive && !model.strange);
        assert_eq!(model.holds, model.outer + kept);
    }

    /// Its guard is dropped: the lock is free, the outer guard's stays.
    fn check_parted(model: &Model, hold: &Held) {
        for session in [OUTSIDE, inside(1)] {
            let mut model = model.clone();
            model.reads(&part(hold, session));
            assert_eq!(model.holds, model.outer);
        }
        assert_eq!(Mysql::part(hold, None).message, None);
    }

    fn part(hold: &Held, session: Session) -> String {
        Mysql::part(hold, Some(session)).message.expect("a message")
    }

    /// Returns how many conversations there are up to that depth.
    fn walk(setting: &Setting, choices: &mut Vec<usize>, depth: usize) -> usize {
        let outcomes = converse(setting, choices);
        if choices.len() == depth {
            return 1;
        }
        let mut conversations = 1;
        for choice in 0..outcomes {
            choices.push(choice);
            conversations += walk(setting, choices, depth);
            choices.pop();
        }
        conversations
    }

    #[test]
    fn acquiring_leaves_neither_a_lock_nor_a_setting_behind_and_takes_no_outer_hold() {
        for wait in [
            UNLIMITED,
            TRY,
            limit(millis(100)),
            poll(None),
            poll(Some(millis(100))),
        ] {
            for ask in [asks(wait), droppable(wait), cancellable(wait)] {
                for outer in [0, 1] {
                    let mut setting = Setting {
                        ask: ask.clone(),
                        outer,
                        pace: millis(30),
                    };
                    assert!(walk(&setting, &mut Vec::new(), 8) > 20);
                    if wait == UNLIMITED || wait == poll(None) {
                        setting.ask.tell_holders = true;
                        setting.pace = millis(1_000);
                        assert!(walk(&setting, &mut Vec::new(), 8) > 20);
                    }
                }
            }
        }
    }

    #[test]
    fn releasing_takes_one_hold() {
        for ask in [asks(TRY), droppable(TRY)] {
            for outer in [0, 1] {
                for held in [0, 1] {
                    let holds = if held == 0 { 0 } else { outer + 1 };
                    let before = Model::new(outer).with(|model| model.holds = holds);
                    let release = || release(ask.clone());
                    let step = release();
                    let outcomes = before.outcomes(step.step());
                    for (at, (answer, after)) in outcomes.into_iter().enumerate() {
                        // The tag of an outcome is that of its own conversation.
                        let mut answered = release().answer(answer);
                        if matches!(answered.step(), Step::Batch(_)) {
                            answered = answered.answer(DONE);
                        }
                        let ended = answered.ended();
                        match (at, ended) {
                            (0, Ok(())) => assert_eq!((held, after.holds), (1, outer)),
                            (0, Err(failure)) => {
                                assert_eq!((held, failure.reason), (0, Reason::NotHeld));
                            }
                            (_, Ok(())) => panic!("released"),
                            (_, Err(failure)) if after.alive => {
                                let expected = match after.strange {
                                    true => Aftermath::EndSessionUnread,
                                    false => Aftermath::EndSession,
                                };
                                assert_eq!(failure.aftermath, expected);
                            }
                            (_, Err(failure)) => assert_eq!(failure, gone()),
                        }
                    }
                }
            }
        }
    }
}
