//! The machines that acquire a slot of a semaphore, with every server that there can be: after whatever answers, what the
//! caller is told is true, and nothing is left behind. And each may be abandoned at every step.
#![cfg(all(feature = "postgres", feature = "mysql", feature = "sqlite"))]

mod script;

use std::fmt::Debug;
use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Bind, Columns, Dialect, Failure, Hold, Machine, Mysql,
    Postgres, Prepared, Reason, Rows, Session, Sqlite, Statement, Step, Wait,
};
use dlock_core::{Holder, LockKey};
use script::{
    DONE, NULL, PACE, Witness, clean, deadlock, lost, millis, out_of_memory, plain, play, value,
    walk_at,
};

const PERMITS: u32 = 3;

const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

fn inside() -> Session {
    Session {
        depth: NonZeroU32::new(1),
        test_transaction: false,
    }
}

/// Each with the time between two answers. A wait without a limit may be told who has the slots, after a while.
fn asks(wait: Wait, droppable: bool) -> Vec<(Ask, Duration)> {
    let mut asks = vec![(ask(wait, droppable), PACE)];
    if wait.limit.is_none() {
        let telling = Ask {
            tell_holders: true,
            ..ask(wait, droppable)
        };
        asks.push((telling, millis(1_100)));
    }
    asks
}

fn holders() -> Answer {
    let holder = Holder::from_columns(7, None, None, 1, 1, None);
    Answer::Rows(Rows::Holders(vec![holder]))
}

fn ask(wait: Wait, droppable: bool) -> Ask {
    Ask {
        wait,
        droppable,
        name_holders: false,
        inside_transaction: true,
        ..Ask::new("gpu".into())
    }
}

/// Without a limit, with one, only a try, and polling.
fn all_waits() -> [Wait; 4] {
    let limit = |limit| Wait {
        limit: Some(limit),
        poll: None,
    };
    [
        Wait::default(),
        limit(millis(70)),
        limit(Duration::ZERO),
        Wait {
            limit: Some(millis(70)),
            poll: Some(millis(50)),
        },
    ]
}

/// By the signatures of the core, a machine borrows what is asked for.
fn slot_of<D: Dialect>(
    ask: &Ask,
    session: Session,
) -> impl Machine<Output = Option<Hold<D::Key>>> + use<D> {
    D::acquire_slot(Box::leak(Box::new(ask.clone())), PERMITS, session).unwrap()
}

/// What a message does, as far as slots are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// It may take a slot, and its answer tells which.
    Takes,
    /// It may take a slot, and its answer does not tell.
    TakesUntold,
    /// It tells which slot was taken.
    Tells,
    /// If it answers as it should, there is no slot.
    Settles,
    /// It has nothing to do with slots.
    Else,
}

/// What the session has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Has {
    Nothing,
    Slot(u32),
    NobodyKnows,
    /// The session is gone.
    Gone,
}

/// What is known of the servers, for the witness.
struct Known {
    does: fn(&Step<()>) -> Does,
    /// The answer to what [`Does::Takes`] or [`Does::Tells`].
    told: fn(Does, &Answer) -> Has,
    settled: fn(&Answer) -> bool,
    /// How a slot is released where nobody reads the answer. SQLite's driver does that by the number of the request.
    releases: Option<&'static str>,
}

struct Truth<'k> {
    known: &'k Known,
    droppable: bool,
    wait: Wait,
    has: Has,
    sent_anything: bool,
}

fn without_output<T>(step: &Step<T>) -> Step<()> {
    match step {
        Step::Query(statement) => Step::Query(statement.clone()),
        Step::Batch(sql) => Step::Batch(sql.clone()),
        Step::Sleep(duration) => Step::Sleep(*duration),
        Step::Tell(holders) => Step::Tell(holders.clone()),
        Step::Done(_) => Step::Done(Ok(())),
    }
}

impl<K: Debug> Witness<Option<Hold<K>>> for Truth<'_> {
    fn sent(&mut self, step: &Step<Option<Hold<K>>>) {
        self.sent_anything = true;
        let does = (self.known.does)(&without_output(step));
        let may_take = matches!(does, Does::Takes | Does::TakesUntold);
        if may_take && self.wait.poll.is_some() {
            assert_eq!(does, Does::Takes, "who polls does not queue");
        }
        if may_take {
            assert_eq!(self.has, Has::Nothing, "it asks for a second slot");
        }
    }

    fn answered(&mut self, step: &Step<Option<Hold<K>>>, answer: &Answer, _now: Duration) {
        let does = (self.known.does)(&without_output(step));
        if let Answer::Error(error) = answer {
            // SQLite has no session to lose, only a connection to ask.
            let lost = error.lost && (self.known.releases.is_some() || does == Does::Else);
            if lost {
                self.has = Has::Gone;
                return;
            }
        }
        // A deadlock is found before anything was granted.
        let is_deadlock =
            matches!(answer, Answer::Error(error) if error.detail.is_some() && error.hint);
        self.has = match does {
            Does::Takes | Does::TakesUntold if is_deadlock && self.known.releases.is_some() => {
                self.has
            }
            // SQLite's driver gives the request up after an error.
            Does::Takes if self.known.releases.is_none() && matches!(answer, Answer::Error(_)) => {
                Has::Nothing
            }
            Does::Takes | Does::Tells => (self.known.told)(does, answer),
            Does::TakesUntold => Has::NobodyKnows,
            Does::Settles if (self.known.settled)(answer) => Has::Nothing,
            Does::Settles | Does::Else => self.has,
        };
    }

    fn abandoned(&self, step: &Step<Option<Hold<K>>>, abandoned: &Abandoned) {
        let does = (self.known.does)(&without_output(step));
        if matches!(step, Step::Sleep(_) | Step::Tell(_)) {
            assert_eq!(self.has, Has::Nothing, "it sleeps with a slot");
            return;
        }
        let Some(releases) = self.known.releases else {
            return;
        };
        assert!(abandoned.broken, "nobody reads the answer");
        let may_have = matches!(does, Does::Takes | Does::TakesUntold | Does::Tells);
        let sends = abandoned
            .messages
            .iter()
            .any(|message| message.contains(releases));
        if self.droppable && may_have {
            // Where nothing is sent, the wait ends when the connection is closed.
            assert!(
                sends || does == Does::TakesUntold || waits(step),
                "a slot stays behind"
            );
        }
        if !self.droppable {
            assert!(abandoned.messages.is_empty());
        }
    }

    fn ended(&mut self, result: Result<Option<Hold<K>>, Failure>, now: Duration) {
        assert!(self.sent_anything);
        match result {
            Ok(Some(hold)) => {
                let slot = hold.slot().expect("a slot");
                assert_eq!(self.has, Has::Slot(slot));
            }
            Ok(None) => {
                assert_eq!(self.has, Has::Nothing, "it gives up with a slot");
                let limit = self.wait.limit.expect("it gives up without a limit");
                assert!(now >= limit, "it gives up before the limit");
            }
            Err(failure) => match failure.aftermath {
                Aftermath::Clean => assert_eq!(self.has, Has::Nothing, "{failure:?}"),
                Aftermath::MarkBroken => assert_eq!(self.has, Has::Gone, "{failure:?}"),
                Aftermath::EndSession | Aftermath::EndSessionUnread => {}
            },
        }
    }
}

/// MySQL's statement that waits.
fn waits<T>(step: &Step<T>) -> bool {
    matches!(step, Step::Query(statement) if statement.text().contains("SLEEP("))
}

fn explore<D: Dialect>(
    known: &Known,
    sessions: &[Session],
    answers: &[Answer],
    depth: usize,
    wrap: bool,
) {
    let mut conversations = 0;
    for wait in all_waits() {
        for droppable in [false, true] {
            for (session, (ask, pace)) in sessions.iter().flat_map(|session| {
                asks(wait, droppable)
                    .into_iter()
                    .map(move |ask| (session, ask))
            }) {
                let truth = || Truth {
                    known,
                    droppable,
                    wait,
                    has: Has::Nothing,
                    sent_anything: false,
                };
                conversations += match wrap {
                    true => walk_at(
                        || Tagged::new(slot_of::<D>(&ask, *session)),
                        truth,
                        answers,
                        depth,
                        pace,
                    ),
                    false => walk_at(|| slot_of::<D>(&ask, *session), truth, answers, depth, pace),
                };
            }
        }
    }
    assert!(conversations > 300, "only {conversations}");
}

fn slot(number: Option<i64>) -> Has {
    match number {
        Some(number @ 0..3) => Has::Slot(number as u32),
        _ => Has::NobodyKnows,
    }
}

mod postgres {
    use super::*;

    fn does(step: &Step<()>) -> Does {
        match step {
            Step::Query(statement) if statement.columns == Columns::Holders => Does::Else,
            Step::Query(statement) => {
                let text = statement.text();
                if text.contains("pg_prepared_statements") {
                    Does::Settles
                } else if text.contains("pg_try_advisory_lock_shared") {
                    Does::Takes
                } else if text.contains("current_setting('dlock.slot', true)") {
                    Does::Tells
                } else {
                    Does::Else
                }
            }
            Step::Batch(sql) if sql.contains("DO $dlock$") => Does::TakesUntold,
            _ => Does::Else,
        }
    }

    fn told(does: Does, answer: &Answer) -> Has {
        match (does, answer) {
            (Does::Takes, Answer::Rows(Rows::Number(Some(-1 | -3)))) => Has::Nothing,
            (Does::Takes, Answer::Rows(Rows::Number(number))) => slot(*number),
            (Does::Tells, Answer::Rows(Rows::Number(Some(0)))) => Has::Nothing,
            (Does::Tells, Answer::Rows(Rows::Number(Some(number)))) => slot(Some(number - 1)),
            _ => Has::NobodyKnows,
        }
    }

    const KNOWN: Known = Known {
        does,
        told,
        settled: |answer| matches!(answer, Answer::Rows(Rows::Number(Some(0 | 2)))),
        releases: Some("pg_advisory_unlock"),
    };

    #[test]
    fn whatever_the_server_answers_no_slot_stays_behind() {
        let answers = [
            value(-1),
            value(-3),
            value(0),
            value(1),
            value(2),
            value(900),
            NULL,
            DONE,
            plain(),
            lost(),
            deadlock(),
            out_of_memory(),
            holders(),
        ];
        explore::<Postgres>(&KNOWN, &[OUTSIDE, inside()], &answers, 5, false);
    }

    #[test]
    fn a_free_slot_takes_one_kept_statement_and_so_does_its_release() {
        let gate = match LockKey::from("gpu")
            .semaphore_lock(None)
            .to_postgres()
            .unwrap()
        {
            dlock_core::PostgresKey::BigInt(gate) => gate,
            other => panic!("{other:?}"),
        };
        let script = play(slot_of::<Postgres>(&ask(Wait::default(), true), OUTSIDE));
        let statement = script.statement().clone();
        assert_eq!(statement.prepared, Prepared::PostgresSlot);
        let binds: Vec<Bind> = statement.binds.iter().cloned().collect();
        assert_eq!(binds[1..], [Bind::BigInt(gate), Bind::BigInt(3)]);
        assert_ne!(binds[0], Bind::BigInt(0), "which would release");
        let hold = script.answer(value(2)).ended().unwrap().expect("a slot");
        assert_eq!(hold.slot(), Some(2));

        let release = play(Postgres::release(hold, OUTSIDE));
        assert_eq!(release.statement().text(), statement.text());
        assert_eq!(release.statement().prepared, Prepared::PostgresSlot);
        let binds: Vec<Bind> = release.statement().binds.iter().cloned().collect();
        assert_eq!(binds[..2], [Bind::BigInt(0), Bind::BigInt(gate + 3)]);
        release.answer(value(1)).ended().expect("released");
    }

    #[test]
    fn a_standby_has_no_slots() {
        let script = play(slot_of::<Postgres>(&ask(Wait::default(), true), OUTSIDE));
        let text = script.statement().text();
        assert!(text.contains("WHEN (pg_catalog.pg_is_in_recovery() OR pg_catalog.texteq(pg_catalog.current_setting('yb_silence_advisory_locks_not_supported_error', true), 'on')) THEN -3 WHEN NOT"));
        let script = script.answer(value(-3)).answer(value(0));
        script.failed_as(clean(Reason::Standby));
    }

    #[test]
    fn a_session_that_may_not_use_plpgsql_polls() {
        let mut script = play(slot_of::<Postgres>(&ask(Wait::default(), false), OUTSIDE));
        script = script.answer(value(-1)).answer(value(-900));
        for _ in 0..3 {
            script = script.sleep(millis(10)).answer(DONE).answer(value(-1));
        }
    }

    #[test]
    fn a_forgotten_statement_is_sent_unprepared_once() {
        let script = play(slot_of::<Postgres>(&ask(Wait::default(), false), OUTSIDE));
        let script = script.answer(plain()).answer(value(2));
        assert_eq!(script.statement().prepared, Prepared::Never);
        script
            .answer(plain())
            .answer(value(2))
            .failed_as(clean(Reason::Interrupted));
    }
}

mod mysql {
    use super::*;

    fn does(step: &Step<()>) -> Does {
        match step {
            Step::Query(statement) if statement.columns == Columns::Holders => Does::Else,
            Step::Query(statement) => {
                let text = statement.text();
                if text.contains("@dlock_errno") {
                    Does::Settles
                } else if text.contains("performance_schema.global_variables") {
                    Does::Else
                } else {
                    Does::Takes
                }
            }
            _ => Does::Else,
        }
    }

    fn told(_does: Does, answer: &Answer) -> Has {
        match answer {
            Answer::Rows(Rows::Pair(number, Some(1))) => slot(*number),
            Answer::Rows(Rows::Pair(_, Some(0 | 2 | 3 | 4))) => Has::Nothing,
            _ => Has::NobodyKnows,
        }
    }

    const KNOWN: Known = Known {
        does,
        told,
        settled: |answer| matches!(answer, Answer::Rows(Rows::Pair(_, Some(1)))),
        releases: Some("RELEASE_LOCK"),
    };

    const fn pair(first: Option<i64>, second: i64) -> Answer {
        Answer::Rows(Rows::Pair(first, Some(second)))
    }

    #[test]
    fn whatever_the_server_answers_no_slot_stays_behind() {
        let answers = [
            pair(Some(2), 1),
            pair(Some(7), 1),
            pair(None, 1),
            pair(Some(-1), 0),
            pair(Some(-1), 2),
            pair(None, 3),
            pair(None, 4),
            value(0),
            pair(Some(1317), 1),
            pair(Some(1193), 1),
            Answer::Rows(Rows::Pair(Some(1), None)),
            NULL,
            DONE,
            plain(),
            lost(),
            holders(),
        ];
        explore::<Mysql>(&KNOWN, &[OUTSIDE, inside()], &answers, 4, true);
    }

    #[test]
    fn a_node_of_a_galera_cluster_has_no_slots() {
        let script = play(Tagged::new(slot_of::<Mysql>(
            &ask(Wait::default(), true),
            OUTSIDE,
        )));
        let text = script.statement().text();
        assert!(text.contains("@dlock_one_node IS NULL, /*M! 3 */ /*!80000 4 */, 0)"));
        script
            .answer(pair(None, 3))
            .failed_as(clean(Reason::Cluster));
    }

    #[test]
    fn one_of_several_mysql_writers_has_no_slots_and_another_is_asked_again() {
        for several in [1, 0] {
            let script = play(Tagged::new(slot_of::<Mysql>(
                &ask(Wait::default(), true),
                OUTSIDE,
            )));
            let script = script.answer(pair(None, 4));
            assert!(script.statement().text().contains("global_variables"));
            let script = script.answer(value(several));
            if several == 1 {
                script.failed_as(clean(Reason::Cluster));
            } else {
                assert!(script.statement().text().contains("@dlock_one_node"));
                script.answer(pair(Some(2), 1)).ended().expect("a slot");
            }
        }
    }

    /// It may hold the gate, which nobody else gets then.
    #[test]
    fn a_wait_that_answers_strangely_is_given_back() {
        let script = play(Tagged::new(slot_of::<Mysql>(
            &ask(Wait::default(), true),
            OUTSIDE,
        )));
        let script = script.answer(pair(None, 0)).answer(pair(None, 4));
        assert!(script.statement().text().contains("@dlock_errno"));
        script
            .answer(pair(None, 1))
            .failed_as(clean(Reason::Database));
    }

    /// What was taken without that question is not released by a statement that asks it.
    #[test]
    fn a_server_that_knows_nothing_of_clusters_is_asked_without_that_question() {
        let script = play(Tagged::new(slot_of::<Mysql>(
            &ask(Wait::default(), true),
            OUTSIDE,
        )));
        let script = script.answer(plain()).answer(DONE);
        let script = script.answer(pair(Some(1193), 1));
        assert!(!script.statement().text().contains("wsrep_on"));
        let hold = script.answer(pair(Some(2), 1)).ended().unwrap();
        let release = play(Mysql::release(hold.expect("a slot"), OUTSIDE));
        assert!(!release.statement().text().contains("wsrep_on"));
    }

    #[test]
    fn a_free_slot_takes_one_kept_statement_and_so_does_its_release() {
        let script = play(Tagged::new(slot_of::<Mysql>(
            &ask(Wait::default(), true),
            OUTSIDE,
        )));
        let statement = script.statement().clone();
        assert_eq!(statement.prepared, Prepared::MysqlSlot);
        let hold = script
            .answer(pair(Some(2), 1))
            .ended()
            .unwrap()
            .expect("a slot");
        assert_eq!(hold.slot(), Some(2));
        let release = play(Tagged::new(Mysql::release(hold, OUTSIDE)));
        assert_eq!(release.statement().text(), statement.text());
        let name = LockKey::from("gpu")
            .semaphore_lock(Some(2))
            .to_mysql()
            .unwrap();
        let binds: Vec<Bind> = release.statement().binds.iter().cloned().collect();
        assert_eq!(
            binds[2..4],
            [Bind::Integer(1), Bind::Binary(name.into_bytes())]
        );
        release.answer(pair(Some(0), 1)).ended().expect("released");
    }

    #[test]
    fn the_answer_to_an_earlier_question_is_not_taken() {
        let script = play(slot_of::<Mysql>(&ask(Wait::default(), true), OUTSIDE));
        script
            .answer(pair(Some(1), 1))
            .failed_as(script::out_of_step());
    }

    #[test]
    fn a_server_that_does_not_wait_is_asked_again_after_a_pause() {
        let script = play(Tagged::new(slot_of::<Mysql>(
            &ask(Wait::default(), true),
            OUTSIDE,
        )));
        script
            .answer(pair(Some(-1), 0))
            .answer(pair(Some(-1), 0))
            .sleep(millis(1));
    }
}

mod sqlite {
    use super::*;

    fn does(step: &Step<()>) -> Does {
        match step {
            Step::Query(statement) if statement.columns == Columns::Text => Does::Else,
            Step::Query(_) => Does::Takes,
            _ => Does::Else,
        }
    }

    fn told(_does: Does, answer: &Answer) -> Has {
        match answer {
            Answer::Rows(Rows::Number(Some(-1 | -2))) => Has::Nothing,
            Answer::Rows(Rows::Number(number)) => slot(*number),
            _ => Has::NobodyKnows,
        }
    }

    const KNOWN: Known = Known {
        does,
        told,
        settled: |_| false,
        releases: None,
    };

    #[test]
    fn whatever_the_functions_answer_no_slot_stays_behind() {
        let answers = [
            value(-2),
            value(-1),
            value(0),
            value(2),
            value(3),
            NULL,
            plain(),
            lost(),
            deadlock(),
            Answer::Rows(Rows::Text("1 7 1 1 - report".into())),
        ];
        explore::<Sqlite>(&KNOWN, &[OUTSIDE, inside()], &answers, 5, false);
    }

    #[test]
    fn a_hold_is_the_slots_by_the_request_that_asked() {
        let script = play(slot_of::<Sqlite>(&ask(Wait::default(), true), OUTSIDE));
        let request = script.statement().request.expect("a request");
        let hold = script.answer(value(2)).ended().unwrap().expect("a slot");
        assert!(Sqlite::requests(&hold).eq([request]));
        let release = play(Sqlite::release(hold, OUTSIDE));
        let key = LockKey::from("gpu")
            .semaphore_lock(Some(2))
            .to_sqlite()
            .unwrap();
        release.query(
            "SELECT dlock_release(?, ?)",
            &[Bind::BigInt(key as i64), Bind::BigInt(request.0)],
        );
    }
}

/// A machine whose server adds the tag of a question, its first bind, to the second number of the answer.
struct Tagged<M> {
    machine: M,
    tag: i64,
}

impl<M: Machine> Tagged<M> {
    fn new(machine: M) -> Self {
        Self { machine, tag: 0 }
    }

    fn note(&mut self, step: Step<M::Output>) -> Step<M::Output> {
        if let Step::Query(Statement { binds, columns, .. }) = &step {
            if *columns == Columns::Holders {
                return step;
            }
            let Some(Bind::BigInt(tag)) = binds.iter().next() else {
                panic!("no tag");
            };
            self.tag = *tag;
        }
        step
    }
}

impl<M: Machine> Machine for Tagged<M> {
    type Output = M::Output;

    fn start(&mut self, now: Duration) -> Step<M::Output> {
        let step = self.machine.start(now);
        self.note(step)
    }

    fn next(&mut self, answer: Answer, now: Duration) -> Step<M::Output> {
        const BASE: i64 = 1 << 62;
        let answer = match answer {
            Answer::Rows(Rows::Pair(first, Some(second))) => {
                Answer::Rows(Rows::Pair(first, Some(BASE + self.tag + second)))
            }
            Answer::Rows(Rows::Number(Some(number))) => {
                Answer::Rows(Rows::Number(Some(BASE + self.tag + number)))
            }
            other => other,
        };
        let step = self.machine.next(answer, now);
        self.note(step)
    }

    fn abandon(&self) -> Abandoned {
        self.machine.abandon()
    }
}

#[test]
fn what_no_semaphore_can_be_is_refused() {
    fn refused<D: Dialect>(key: &str, permits: u32) {
        let ask = Ask::new(key.into());
        let failure = D::acquire_slot(&ask, permits, OUTSIDE)
            .err()
            .expect("refused");
        assert!(
            matches!(failure.reason, Reason::InvalidKey(_)),
            "{failure:?}"
        );
        assert_eq!(failure.aftermath, Aftermath::Clean);
        assert!(D::slot_holders(&ask.key, permits).is_err());
    }
    for (key, permits) in [("gpu", 0), ("gpu", 1001), ("", 1)] {
        refused::<Postgres>(key, permits);
        refused::<Mysql>(key, permits);
        refused::<Sqlite>(key, permits);
    }
    let ask = Ask::new("gpu".into());
    let in_transaction = Some(clean(Reason::InTransaction));
    assert_eq!(
        Postgres::acquire_slot(&ask, 1, inside()).err(),
        in_transaction
    );
    assert_eq!(Mysql::acquire_slot(&ask, 1, inside()).err(), in_transaction);
    assert_eq!(
        Sqlite::acquire_slot(&ask, 1, inside()).err(),
        in_transaction
    );
}
