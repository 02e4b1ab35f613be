use super::sql::{self, Cluster};
use super::tag::Tag;
use crate::proto::{Answer, Cause, ErrorFields, Failure, Reason, Rows, Statement};

/// The question whether this is one of several servers that take writes, after a statement that found that it may be.
#[derive(Debug)]
pub(super) struct Writers {
    tag: Tag,
    /// Of that statement.
    cause: Cause,
}

impl Writers {
    pub(super) fn ask(cause: Cause) -> (Self, Statement) {
        let tag = Tag::new();
        (Self { tag, cause }, sql::several_writers(tag))
    }

    /// How the lock is to be asked for next. It fails if this is one of several.
    pub(super) fn next(self, answer: Answer) -> Result<Cluster, Failure> {
        match answer {
            Answer::Rows(Rows::Number(number)) => match self.tag.remove(number)? {
                0 => Ok(Cluster::Alone),
                _ => Err(Reason::Cluster.clean(self.cause)),
            },
            Answer::Error(ErrorFields {
                lost: true, cause, ..
            }) => Err(Failure::lost(cause)),
            // An engine without that table, as TiDB.
            _ => Ok(Cluster::Unchecked),
        }
    }
}
