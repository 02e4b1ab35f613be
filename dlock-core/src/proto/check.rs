use std::collections::HashMap;
use std::time::Duration;

use super::{Abandoned, Answer, Failure, Machine, Rows, Statement, Step};
use crate::Report;

/// Collects facts about a server and judges them.
///
/// | sent | answer | then |
/// |---|---|---|
/// | each question in turn | a text of lines `name=value` | the lines are facts |
/// | | without the tag, where there is one | fails: it is out of step |
/// | | an error: the session is gone | fails |
/// | | any other error | a fact: the question has failed |
/// | | to the last question | judges |
/// | is the session there? Where none was answered | an error | fails: the session is gone |
/// | | anything else | judges |
///
/// Every question is one statement that leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Check {
    questions: std::vec::IntoIter<(&'static str, Statement)>,
    asked: &'static str,
    /// What the fact `tag` has to be.
    tag: Option<String>,
    facts: Facts,
    judge: fn(&Facts) -> Report,
    abandoned: Abandoned,
    /// What any session obeys.
    are_you_there: &'static str,
    is_asked_whether_there: bool,
}

/// What is known of a server.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    facts: HashMap<String, String>,
    failed: Vec<&'static str>,
    /// The backend ids of the answers.
    ids: Vec<String>,
}

impl Facts {
    /// The value of a fact; empty if nothing is known.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.facts.get(name).map_or("", String::as_str)
    }

    pub(crate) fn is(&self, name: &str, value: &str) -> bool {
        self.get(name) == value
    }

    /// The value of a fact, if it is a number.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.get(name).parse().ok()
    }

    /// The value of a setting that limits a time, unless it is off or unknown.
    pub(crate) fn limit(&self, name: &str) -> Option<&str> {
        Some(self.get(name)).filter(|value| !value.is_empty() && !value.starts_with('0'))
    }

    pub(crate) fn has_failed(&self, question: &str) -> bool {
        self.failed.contains(&question)
    }

    /// Whether different sessions have answered.
    pub(crate) fn sessions_differ(&self) -> bool {
        self.ids.windows(2).any(|pair| pair[0] != pair[1])
    }

    fn add(&mut self, text: &str) {
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            if name == "id" {
                self.ids.push(value.to_owned());
            } else {
                self.facts.insert(name.to_owned(), value.to_owned());
            }
        }
    }
}

impl Check {
    pub(crate) fn new(
        questions: Vec<(&'static str, Statement)>,
        judge: fn(&Facts) -> Report,
        are_you_there: &'static str,
        abandoned: Abandoned,
    ) -> Self {
        Self {
            questions: questions.into_iter(),
            asked: "",
            tag: None,
            facts: Facts::default(),
            judge,
            abandoned,
            are_you_there,
            is_asked_whether_there: false,
        }
    }

    /// Each answer has this tag, or it is the answer to an earlier question.
    pub(crate) fn tagged(mut self, tag: i64) -> Self {
        self.tag = Some(tag.to_string());
        self
    }

    fn ask(&mut self) -> Step<Report> {
        match self.questions.next() {
            Some((name, statement)) => {
                self.asked = name;
                Step::Query(statement)
            }
            // Drivers do not always tell the loss of a connection from other errors.
            None if self.facts.facts.is_empty() && !self.is_asked_whether_there => {
                self.is_asked_whether_there = true;
                Step::Batch(self.are_you_there.into())
            }
            None => Step::Done(Ok((self.judge)(&self.facts))),
        }
    }
}

impl Machine for Check {
    type Output = Report;

    const TIMED: bool = false;

    fn start(&mut self, _now: Duration) -> Step<Report> {
        self.ask()
    }

    fn next(&mut self, answer: Answer, _now: Duration) -> Step<Report> {
        match answer {
            Answer::Rows(Rows::Text(text)) => {
                self.facts.facts.remove("tag");
                self.facts.add(&text);
                if self
                    .tag
                    .as_ref()
                    .is_some_and(|tag| !self.facts.is("tag", tag))
                {
                    return Step::failed(Failure::out_of_step());
                }
            }
            Answer::Error(error) if error.lost || self.is_asked_whether_there => {
                return Step::failed(Failure::lost(error.cause));
            }
            Answer::Done => {}
            _ => self.facts.failed.push(self.asked),
        }
        self.ask()
    }

    fn abandon(&self) -> Abandoned {
        self.abandoned.clone()
    }
}
