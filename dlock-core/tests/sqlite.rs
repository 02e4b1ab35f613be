//! The machines of SQLite, answer by answer.
#![cfg(feature = "sqlite")]

mod script;

use std::fmt::Debug;
use std::num::NonZeroU32;
use std::time::Duration;

use dlock_core::proto::{
    Abandoned, Aftermath, Answer, Ask, Bind, Columns, Dialect, ErrorFields, Failure, Hold, Machine,
    Parting, Prepared, Reason, Request, Rows, Session, Sqlite, Statement, Step, Wait,
};
use dlock_core::{Holder, LockKey, Mode};
use script::{
    Because, DONE, NULL, Script, Witness, broken, clean, error, millis, out_of_step, plain, play,
    play_at, value, walk, walk_at,
};

type Held = Hold<<Sqlite as Dialect>::Key>;

const GRANTED: Answer = value(1);
const BUSY: Answer = value(0);
const GIVEN_UP: Answer = value(-1);

const ROLL_BACK: &str = "SAVEPOINT dlock; ROLLBACK";

const OUTSIDE: Session = Session {
    depth: None,
    test_transaction: false,
};

fn inside(depth: u32) -> Session {
    Session {
        depth: NonZeroU32::new(depth),
        test_transaction: false,
    }
}

const FOREVER: Wait = Wait {
    limit: None,
    poll: None,
};
const TRY: Wait = limit(Duration::ZERO);

const fn limit(limit: Duration) -> Wait {
    Wait {
        limit: Some(limit),
        poll: None,
    }
}

fn poll(limit: Option<Duration>) -> Wait {
    Wait {
        limit,
        poll: Some(millis(50)),
    }
}

/// The error of a function of dlock, which names it by a constraint.
fn fails(constraint: &str) -> Answer {
    error(ErrorFields {
        constraint: Some(constraint.into()),
        ..ErrorFields::default()
    })
}

/// The request was there, and the driver has given it up.
fn error_given_up() -> Answer {
    error(ErrorFields {
        given_up: true,
        ..ErrorFields::default()
    })
}

fn text(text: &str) -> Answer {
    Answer::Rows(Rows::Text(text.into()))
}

fn ask(wait: Wait) -> Ask {
    Ask {
        wait,
        name_holders: false,
        ..Ask::new(42.into())
    }
}

fn acquire_as(ask: Ask, session: Session) -> impl Machine<Output = Option<Held>> {
    // By the signature of `acquire`, a machine borrows what is asked for.
    Sqlite::acquire(Box::leak(Box::new(ask)), session).unwrap()
}

fn acquire(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
    play(acquire_as(ask(wait), OUTSIDE))
}

/// A hold, and its request.
fn acquired(ask: Ask, session: Session) -> (Held, Request) {
    let script = play(acquire_as(ask, session));
    let request = script.request();
    (script.answer(GRANTED).holds(), request)
}

fn held() -> (Held, Request) {
    acquired(ask(FOREVER), OUTSIDE)
}

trait Speaks: Sized {
    /// The request that the statement is for. Its number is the last bind.
    fn request(&self) -> Request;
    fn asks(self, request: Request, millis: i64) -> Self;
    fn gives_back(self, request: Request) -> Self;
    fn asks_for_holders(self) -> Self;
}

impl<M: Machine<Output: Debug>> Speaks for Script<M> {
    #[track_caller]
    fn request(&self) -> Request {
        let statement = self.statement();
        let request = statement.request.expect("no request");
        assert_eq!(
            statement.binds.iter().last(),
            Some(&Bind::BigInt(request.0))
        );
        request
    }

    #[track_caller]
    fn asks(self, request: Request, millis: i64) -> Self {
        assert_eq!(self.request(), request);
        let binds = [
            Bind::BigInt(42),
            Bind::BigInt(millis),
            Bind::BigInt(request.0),
        ];
        self.query("SELECT dlock_acquire(?, 1, ?, ?)", &binds)
    }

    #[track_caller]
    fn gives_back(self, request: Request) -> Self {
        assert_eq!(self.request(), request);
        let binds = [Bind::BigInt(42), Bind::BigInt(request.0)];
        self.query("SELECT dlock_release(?, ?)", &binds)
    }

    #[track_caller]
    fn asks_for_holders(self) -> Self {
        assert_eq!(self.statement().columns, Columns::Text);
        assert_eq!(self.statement().request, None);
        self.query("SELECT dlock_holders(?)", &[Bind::BigInt(42)])
    }
}

trait Acquires {
    fn holds(self) -> Held;
    fn gave_up(self);
}

impl<M: Machine<Output = Option<Held>>> Acquires for Script<M> {
    #[track_caller]
    fn holds(self) -> Held {
        self.ended().expect("failed").expect("gave up")
    }

    #[track_caller]
    fn gave_up(self) {
        assert!(self.ended().expect("failed").is_none());
    }
}

mod asking {
    use super::*;

    #[test]
    fn each_acquire_has_a_request_of_its_own() {
        let (one, two) = (acquire(FOREVER), acquire(FOREVER));
        assert_ne!(one.request(), two.request());
    }

    #[test]
    fn a_hold_knows_its_request() {
        let (hold, request) = held();
        assert!(Sqlite::requests(&hold).eq([request]));
        assert_eq!((hold.depth(), hold.mode()), (None, Mode::Exclusive));
    }

    #[test]
    fn it_waits_where_the_lock_is_asked_for() {
        for (wait, millis) in [
            (FOREVER, -1),
            (limit(millis(250)), 250),
            (limit(Duration::from_nanos(1)), 1),
            (TRY, 0),
        ] {
            let script = acquire(wait);
            let request = script.request();
            script.asks(request, millis).answer(GRANTED).holds();
        }
    }

    #[test]
    fn shared_is_asked_for_as_shared() {
        let ask = Ask {
            mode: Mode::Shared,
            ..ask(TRY)
        };
        let script = play(acquire_as(ask, OUTSIDE));
        let binds = [
            Bind::BigInt(42),
            Bind::BigInt(0),
            Bind::BigInt(script.request().0),
        ];
        let hold = script
            .query("SELECT dlock_acquire(?, 0, ?, ?)", &binds)
            .answer(GRANTED)
            .holds();
        assert_eq!(hold.mode(), Mode::Shared);
    }

    #[test]
    fn what_is_left_after_a_limit_is_waited_for() {
        let script = acquire(limit(Duration::MAX));
        let request = script.request();
        script
            .asks(request, i32::MAX.into())
            .at(millis(i32::MAX as u64))
            .answer(BUSY)
            .asks(request, i32::MAX.into());
    }

    #[test]
    fn the_limit_counts_from_the_start() {
        let script = play_at(acquire_as(ask(limit(millis(250))), OUTSIDE), millis(9_000));
        let request = script.request();
        script
            .asks(request, 250)
            .after(millis(100))
            .answer(BUSY)
            .asks(request, 150)
            .after(millis(150))
            .answer(BUSY)
            .gave_up();
    }

    #[test]
    fn polling_never_waits_in_the_queue() {
        let script = acquire(poll(Some(millis(80))));
        let request = script.request();
        script
            .asks(request, 0)
            .answer(BUSY)
            .sleep(millis(50))
            .at(millis(50))
            .answer(DONE)
            .asks(request, 0)
            .answer(BUSY)
            .sleep(millis(30))
            .at(millis(80))
            .answer(DONE)
            .asks(request, 0)
            .answer(BUSY)
            .gave_up();
    }

    #[test]
    fn an_invalid_key_is_refused() {
        let key = LockKey::from("");
        let invalid = Failure::from(key.to_sqlite().unwrap_err());
        assert_eq!(
            Sqlite::acquire(&Ask::new(key.clone()), OUTSIDE).err(),
            Some(invalid.clone())
        );
        assert_eq!(Sqlite::holders(&key).err(), Some(invalid));
    }

    #[test]
    fn an_open_transaction_is_refused_unless_it_is_allowed() {
        let refused = |session| Sqlite::acquire(&ask(TRY), session).err();
        assert_eq!(refused(inside(1)), Some(clean(Reason::InTransaction)));
        assert_eq!(
            refused(Session {
                test_transaction: true,
                ..inside(1)
            }),
            None
        );
        let allowed = Ask {
            inside_transaction: true,
            ..ask(TRY)
        };
        let (hold, _) = acquired(allowed, inside(2));
        assert_eq!(hold.depth(), NonZeroU32::new(2));
    }
}

mod timeouts {
    use super::*;

    fn acquire_or_name(wait: Wait) -> Script<impl Machine<Output = Option<Held>>> {
        play(acquire_as(
            Ask {
                name_holders: true,
                ..ask(wait)
            },
            OUTSIDE,
        ))
    }

    fn timeout(waited: Duration, holders: Vec<Holder>) -> Failure {
        clean(Reason::Timeout { waited, holders })
    }

    #[test]
    fn a_limit_that_passed_is_no_failure_unless_holders_are_to_be_named() {
        acquire(TRY).answer(BUSY).gave_up();
        acquire(limit(millis(250)))
            .at(millis(250))
            .answer(BUSY)
            .gave_up();
    }

    #[test]
    fn a_timeout_names_the_holders() {
        let holder = Holder::from_columns(4711, Some("billing".into()), None, 1, 1, Some(7));
        acquire_or_name(limit(millis(250)))
            .at(millis(260))
            .answer(BUSY)
            .asks_for_holders()
            .answer(text(&Sqlite::write_holders(&[(1, holder.clone())])))
            .failed(timeout(millis(260), vec![holder]));
    }

    #[test]
    fn a_timeout_that_cannot_name_the_holders_is_still_a_timeout() {
        let unnamed = timeout(Duration::ZERO, vec![]);
        for answer in [plain(), text(""), text("no holder")] {
            acquire_or_name(TRY)
                .answer(BUSY)
                .answer(answer)
                .failed(unnamed.clone());
        }
        for answer in [value(1), NULL] {
            acquire_or_name(TRY)
                .answer(BUSY)
                .answer(answer)
                .failed(Failure {
                    aftermath: Aftermath::EndSessionUnread,
                    ..unnamed.clone()
                });
        }
    }
}

mod failures {
    use super::*;

    #[test]
    fn an_error_that_a_function_names_leaves_nothing() {
        let after = |answer| acquire(FOREVER).answer(answer);
        after(fails(Sqlite::DEADLOCK)).failed(clean(Reason::Deadlock).because());
        after(fails(Sqlite::UNSUPPORTED)).failed(clean(Reason::Unsupported).because());
        after(GIVEN_UP).failed(clean(Reason::Interrupted));
    }

    /// The driver has given the request up by its number.
    #[test]
    fn any_other_error_leaves_nothing() {
        for answer in [plain(), error_given_up(), fails("another")] {
            acquire(FOREVER)
                .answer(answer)
                .failed(clean(Reason::Database).because());
        }
    }

    #[test]
    fn after_a_strange_answer_what_may_be_held_is_given_back() {
        for strange in [NULL, value(7), text("1"), DONE] {
            let given_back = |answer| {
                let script = acquire(FOREVER);
                let request = script.request();
                script
                    .answer(strange.clone())
                    .gives_back(request)
                    .answer(answer)
            };
            for released in [BUSY, GRANTED, error_given_up()] {
                given_back(released).failed(clean(Reason::Database));
            }
            for unclear in [NULL, value(7), text("1"), DONE] {
                given_back(unclear).failed(broken(Reason::Database));
            }
            given_back(plain()).failed(broken(Reason::Database).because());
        }
    }
}

mod releasing {
    use super::*;

    fn release(answer: Answer) -> Script<impl Machine<Output = ()>> {
        let (hold, request) = held();
        play(Sqlite::release(hold, OUTSIDE))
            .gives_back(request)
            .answer(answer)
    }

    #[test]
    fn a_release_says_whether_the_lock_was_held() {
        assert_eq!(release(GRANTED).ended(), Ok(()));
        let not_held = Failure {
            aftermath: Aftermath::MarkBroken,
            ..clean(Reason::NotHeld)
        };
        release(BUSY).failed(not_held);
    }

    /// The driver does not need the connection for it.
    #[test]
    fn a_release_that_failed_has_released_if_the_request_was_there() {
        assert_eq!(release(error_given_up()).ended(), Ok(()));
        release(plain()).failed(broken(Reason::Database).because());
    }

    #[test]
    fn after_a_strange_answer_nobody_knows() {
        for strange in [NULL, value(7), text("1"), DONE] {
            release(strange).failed(broken(Reason::Database));
        }
    }

    #[test]
    fn a_shared_lock_and_one_of_a_transaction_are_released_alike() {
        let ask = Ask {
            mode: Mode::Shared,
            inside_transaction: true,
            ..ask(TRY)
        };
        for session in [OUTSIDE, inside(1), inside(2)] {
            let (hold, request) = acquired(ask.clone(), inside(1));
            let script = play(Sqlite::release(hold, session)).gives_back(request);
            assert_eq!(script.answer(GRANTED).ended(), Ok(()));
        }
    }
}

/// What somebody who cannot wait does.
mod dropped {
    use super::*;

    fn abandoned(script: &Script<impl Machine<Output: Debug>>) -> Option<Request> {
        assert_eq!(script.abandoned(), Abandoned::default());
        match script.step() {
            Step::Query(statement) => statement.request,
            _ => None,
        }
    }

    #[test]
    fn a_question_that_is_dropped_says_which_request_to_give_up() {
        let script = acquire(poll(None));
        let request = script.request();
        assert_eq!(abandoned(&script), Some(request));
        let script = script.answer(BUSY);
        assert_eq!(abandoned(&script), None);
        let script = script.answer(DONE);
        assert_eq!(abandoned(&script), Some(request));
        let script = script.answer(NULL).gives_back(request);
        assert_eq!(abandoned(&script), Some(request));
        script.answer(GRANTED).failed(clean(Reason::Database));
    }

    #[test]
    fn a_release_that_is_dropped_says_which_request_to_give_up() {
        let (hold, request) = held();
        assert_eq!(
            abandoned(&play(Sqlite::release(hold, OUTSIDE))),
            Some(request)
        );
    }

    #[test]
    fn questions_that_change_nothing_have_no_request() {
        let (hold, _) = held();
        assert_eq!(abandoned(&play(Sqlite::is_held(&hold))), None);
        assert_eq!(abandoned(&play(Sqlite::holders(&42.into()).unwrap())), None);
        let ask = Ask {
            name_holders: true,
            ..ask(TRY)
        };
        let timed_out = play(acquire_as(ask, OUTSIDE)).answer(BUSY);
        assert_eq!(abandoned(&timed_out.asks_for_holders()), None);
    }

    #[test]
    fn a_transaction_that_was_begun_under_the_lock_goes_before_it() {
        let (hold, request) = held();
        // The connection is broken, so a transaction may be open.
        for session in [Some(inside(1)), Some(inside(2)), None] {
            let parting = Parting {
                message: Some(ROLL_BACK.into()),
                broken: true,
                request: Some(request),
                more_requests: Vec::new(),
            };
            assert_eq!(Sqlite::part(&hold, session), parting);
        }
    }

    #[test]
    fn without_an_open_transaction_only_the_request_is_given_up() {
        let (hold, request) = held();
        let parting = Parting {
            request: Some(request),
            ..Parting::default()
        };
        assert_eq!(Sqlite::part(&hold, Some(OUTSIDE)), parting);
    }

    #[test]
    fn the_transaction_in_which_the_lock_was_acquired_stays() {
        let ask = Ask {
            inside_transaction: true,
            ..ask(TRY)
        };
        let (hold, request) = acquired(ask, inside(1));
        let parting = Parting {
            request: Some(request),
            ..Parting::default()
        };
        let test = Session {
            test_transaction: true,
            ..inside(1)
        };
        for session in [
            Some(OUTSIDE),
            Some(inside(1)),
            Some(inside(2)),
            Some(test),
            None,
        ] {
            assert_eq!(Sqlite::part(&hold, session), parting);
        }
    }

    /// What outer guards hold stays.
    #[test]
    fn a_session_is_rolled_back_in_place_of_its_end() {
        assert_eq!(Sqlite::END_SESSION, [ROLL_BACK]);
    }
}

mod questions {
    use super::*;

    #[test]
    fn a_session_says_whether_it_holds_the_lock() {
        let (hold, request) = held();
        let is_held = |answer| {
            let binds = [Bind::BigInt(42), Bind::BigInt(request.0)];
            let script = play(Sqlite::is_held(&hold));
            script
                .query("SELECT dlock_is_held(?, ?)", &binds)
                .answer(answer)
                .ended()
        };
        assert_eq!(is_held(value(1)), Ok(true));
        assert_eq!(is_held(value(0)), Ok(false));
        assert_eq!(is_held(NULL), Ok(false));
        assert_eq!(is_held(plain()), Err(clean(Reason::Database).because()));
        assert_eq!(is_held(text("1")), Err(out_of_step()));
    }

    fn holders(answer: Answer) -> Result<Vec<Holder>, Failure> {
        play(Sqlite::holders(&42.into()).unwrap())
            .asks_for_holders()
            .answer(answer)
            .ended()
    }

    #[test]
    fn holders_are_read_as_they_were_written() {
        let billing = Some("billing".into());
        let lines = Some("two words\nand lines".into());
        let written = [
            (
                1,
                Holder::from_columns(4711, billing, None, 1, 1, Some(1_700_000_000_000_001)),
            ),
            (2, Holder::from_columns(4711, lines, None, 0, 1, None)),
            (-3, Holder::from_columns(0, None, None, 1, 0, Some(0))),
        ];
        let read = holders(text(&Sqlite::write_holders(&written))).unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!(read[0], written[0].1);
        assert_eq!(
            read[1].application_name.as_deref(),
            Some("two words and lines")
        );
        assert_eq!(
            (read[1].mode, read[1].granted, read[1].since),
            (Mode::Shared, true, None)
        );
        assert_eq!(read[2], written[2].1);
    }

    #[test]
    fn that_nobody_holds_the_lock_is_an_answer() {
        assert_eq!(holders(text("")), Ok(vec![]));
        assert_eq!(holders(text("no holder\n1 2\n")), Ok(vec![]));
    }

    #[test]
    fn that_nobody_can_tell_is_an_error() {
        assert_eq!(holders(plain()), Err(clean(Reason::Database).because()));
        assert_eq!(holders(value(1)), Err(out_of_step()));
    }

    #[test]
    fn no_statement_names_a_table_and_each_is_found_by_its_text() {
        let statements = [
            acquire(TRY).statement().clone(),
            play(Sqlite::is_held(&held().0)).statement().clone(),
            play(Sqlite::holders(&42.into()).unwrap())
                .statement()
                .clone(),
            play(Sqlite::release(held().0, OUTSIDE)).statement().clone(),
        ];
        for statement in statements {
            assert!(!statement.text().contains("FROM"), "{statement:?}");
            assert_eq!(statement.prepared, Prepared::ByText);
        }
        assert!(!Sqlite::END_SESSION.concat().contains("FROM"));
    }
}

/// Somebody who knows what the functions and the driver do.
struct Observer {
    wait: Wait,
    name_holders: bool,
    /// At the limit, or before.
    asks_for_holders: bool,
    request: Option<Request>,
    may_hold: bool,
    /// The last answer was that another session has the lock.
    busy: bool,
}

impl Observer {
    fn acquiring(wait: Wait, name_holders: bool) -> Self {
        Self {
            wait,
            name_holders,
            asks_for_holders: name_holders,
            request: None,
            may_hold: false,
            busy: false,
        }
    }

    fn releasing() -> Self {
        Self {
            may_hold: true,
            ..Self::acquiring(FOREVER, false)
        }
    }

    fn failed(&self, failure: &Failure, elapsed: Duration) {
        match &failure.reason {
            Reason::Timeout { waited, .. } => {
                assert!(self.name_holders && self.busy);
                assert!(self.wait.limit.is_some_and(|limit| limit <= *waited));
                assert!(*waited <= elapsed);
            }
            Reason::NotHeld => assert_eq!(failure.aftermath, Aftermath::MarkBroken),
            _ => {}
        }
        assert_eq!(failure.aftermath == Aftermath::EndSession, self.may_hold);
    }
}

fn calls(statement: &Statement, function: &str) -> bool {
    statement.text().contains(function)
}

impl<T: Outcome> Witness<T> for Observer {
    fn sent(&mut self, step: &Step<T>) {
        let Step::Query(statement) = step else {
            assert!(matches!(step, Step::Sleep(_) | Step::Tell(_)), "{step:?}");
            assert!(!self.may_hold, "it may hold the lock while it sleeps");
            return;
        };
        if calls(statement, "dlock_holders") {
            assert!(self.asks_for_holders && !self.may_hold);
            return;
        }
        let request = *self
            .request
            .get_or_insert(statement.request.expect("no request"));
        assert_eq!(
            statement.request,
            Some(request),
            "one conversation, one request"
        );
        if calls(statement, "dlock_acquire") {
            assert!(!self.may_hold, "it may hold the lock already");
        } else {
            assert!(calls(statement, "dlock_release"), "{statement:?}");
            assert!(self.may_hold, "there is nothing to give back");
        }
    }

    fn answered(&mut self, step: &Step<T>, answer: &Answer, _elapsed: Duration) {
        let Step::Query(statement) = step else { return };
        if calls(statement, "dlock_acquire") {
            self.busy = *answer == BUSY;
            // The driver gives up a request that fails.
            let nothing = *answer == BUSY || *answer == GIVEN_UP;
            self.may_hold = !(nothing || matches!(answer, Answer::Error(_)));
        } else if calls(statement, "dlock_release") {
            let answered = *answer == BUSY || *answer == GRANTED;
            let given_up = matches!(answer, Answer::Error(error) if error.given_up);
            self.may_hold = !(answered || given_up);
        }
    }

    /// There is nothing to send: what may be held is the request of the statement, which the driver gives up.
    fn abandoned(&self, step: &Step<T>, abandoned: &Abandoned) {
        assert_eq!(*abandoned, Abandoned::default());
        let given_up = match step {
            Step::Query(statement) => statement.request,
            _ => None,
        };
        assert!(
            !self.may_hold || given_up == self.request,
            "a hold stays behind"
        );
    }

    fn ended(&mut self, result: Result<T, Failure>, elapsed: Duration) {
        let request = self.request.expect("nothing was asked");
        match result {
            Ok(outcome) => match outcome.end() {
                End::Holds(held) => {
                    assert!(self.may_hold, "it holds nothing");
                    assert_eq!(held, request);
                }
                End::GaveUp => {
                    assert!(self.busy && !self.may_hold && !self.name_holders);
                    assert!(self.wait.limit.is_some_and(|limit| limit <= elapsed));
                }
                End::Released => assert!(!self.may_hold, "it may hold the lock"),
            },
            Err(failure) => self.failed(&failure, elapsed),
        }
    }
}

/// How a conversation ended, if it did not fail.
enum End {
    Holds(Request),
    GaveUp,
    Released,
}

trait Outcome: Debug {
    fn end(&self) -> End;
}

impl Outcome for Option<Held> {
    fn end(&self) -> End {
        match self {
            Some(hold) => End::Holds(Sqlite::requests(hold).next().expect("no request")),
            None => End::GaveUp,
        }
    }
}

impl Outcome for () {
    fn end(&self) -> End {
        End::Released
    }
}

fn all_answers() -> Vec<Answer> {
    vec![
        GRANTED,
        BUSY,
        GIVEN_UP,
        NULL,
        value(7),
        text("1 7 1 1 - report"),
        DONE,
        plain(),
        error_given_up(),
        fails(Sqlite::DEADLOCK),
        fails(Sqlite::UNSUPPORTED),
        fails("another"),
    ]
}

#[test]
fn no_conversation_ends_with_a_hold_that_nobody_knows_of() {
    let answers = all_answers();
    let waits = [
        FOREVER,
        TRY,
        limit(millis(100)),
        poll(None),
        poll(Some(millis(100))),
    ];
    for (wait, name_holders) in waits
        .into_iter()
        .flat_map(|wait| [(wait, false), (wait, true)])
    {
        let ask = Ask {
            name_holders,
            ..ask(wait)
        };
        let machine = || Sqlite::acquire(&ask, OUTSIDE).unwrap();
        let observer = || Observer::acquiring(wait, name_holders);
        let conversations = walk(machine, observer, &answers, 7);
        assert!(conversations > answers.len());
        let ask = Ask {
            tell_holders: true,
            ..ask.clone()
        };
        let machine = || Sqlite::acquire(&ask, OUTSIDE).unwrap();
        let observer = || Observer {
            asks_for_holders: true,
            ..Observer::acquiring(wait, name_holders)
        };
        walk_at(machine, observer, &answers, 7, millis(1_000));
    }
}

#[test]
fn a_long_wait_is_cut_once_to_tell_who_has_the_lock() {
    let telling = |wait| {
        play(acquire_as(
            Ask {
                tell_holders: true,
                ..ask(wait)
            },
            OUTSIDE,
        ))
    };
    let started = telling(FOREVER);
    let request = started.request();
    let told = started
        .asks(request, 1_000)
        .at(millis(1_000))
        .answer(BUSY)
        .asks_for_holders()
        .answer(text("1 7 1 1 - report"));
    let holder = Holder::from_columns(7, Some("report".into()), None, 1, 1, None);
    assert!(
        matches!(told.step(), Step::Tell(told) if told[0].backend_id == holder.backend_id),
        "{:?}",
        told.step()
    );
    let again = told.answer(DONE).asks(request, -1).at(millis(9_000));
    again.answer(BUSY).asks(request, -1);
    // The limit counts from the start.
    let late = telling(limit(millis(2_500))).at(millis(1_000)).answer(BUSY);
    let late = late.at(millis(1_200)).answer(text("")).at(millis(2_500));
    let request = late.request();
    late.asks(request, 1_300).answer(BUSY).gave_up();
    // Short.
    let short = telling(limit(millis(1_999)));
    let request = short.request();
    short.asks(request, 1_999);
}

#[test]
fn no_release_ends_with_a_hold_that_nobody_knows_of() {
    let answers = all_answers();
    let machine = || Sqlite::release(held().0, OUTSIDE);
    assert_eq!(
        walk(machine, Observer::releasing, &answers, 2),
        answers.len() + 1
    );
}
