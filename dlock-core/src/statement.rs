use std::borrow::Cow;

#[cfg(feature = "mysql")]
use crate::fence;

/// A statement with binds, which answers with one row of one `BIGINT` (or, for
/// [`holders`](crate::Dialect::holders), with the columns of [`Holder`](crate::Holder)).
///
/// Its text depends on [`pieces`](Self::pieces) of SQL alone: keys travel as binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// SQL and binds in turn.
    pub pieces: Vec<Piece>,
    /// Whether to keep the prepared statement: its text is one of few.
    pub cached: bool,
    /// A number from 0 to 14 that no other text has, on any server: those that are sent most have one, so that a driver
    /// finds the prepared statement without reading the text.
    pub number: Option<u8>,
    /// What its answer is to be [checked](Nonce::check) with, if it is.
    pub nonce: Option<Nonce>,
}

/// A number that the answer to a [`Statement`] is greater by, so that the answer to another question is told from it: a
/// connection on which a query was dropped may be out of step, and then it gives the answer to the query before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonce(i64);

/// The answer was to another question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfStep;

impl Nonce {
    /// A constant in the text of the question, by which MariaDB (11.8) knows from the start that the answer has 64 bits:
    /// a bind does not tell.
    #[cfg(feature = "mysql")]
    pub(crate) const BASE: i64 = 1 << 62;

    /// A number that is like no answer of a user's query, and far from all others.
    #[cfg(feature = "mysql")]
    pub(crate) fn new() -> Self {
        const BITS_OF_AN_ANSWER: u32 = 20;
        Self(Self::BASE | ((fence::unique() << BITS_OF_AN_ANSWER) % (1 << 61)) as i64)
    }

    /// The bind that says it.
    #[cfg(feature = "mysql")]
    pub(crate) fn bind(self) -> Piece {
        Piece::BigInt(self.0 - Self::BASE)
    }

    /// What was answered without this number; NULL stays NULL.
    ///
    /// # Examples
    ///
    #[cfg_attr(feature = "mysql", doc = "```")]
    #[cfg_attr(not(feature = "mysql"), doc = "```ignore")]
    /// use dlock_core::{Dialect, Mode, Mysql};
    ///
    /// let is_held = Mysql::is_held(&Mysql::key(&"report".into())?, Mode::Exclusive);
    /// let nonce = is_held.nonce.unwrap();
    /// assert!(nonce.check(Some(1)).is_err()); // not the answer to this question
    /// # Ok::<(), dlock_core::InvalidKey>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`OutOfStep`] if this was not added to it.
    pub fn check(self, answer: Option<i64>) -> Result<Option<i64>, OutOfStep> {
        // From -1, and an error number has 16 bits.
        match answer.map(|value| value.wrapping_sub(self.0)) {
            Some(value) if !(-1..=0xffff).contains(&value) => Err(OutOfStep),
            value => Ok(value),
        }
    }
}

/// A part of a [`Statement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text of the statement.
    Sql(Cow<'static, str>),
    /// A 64-bit integer to bind.
    BigInt(i64),
    /// A 32-bit integer to bind.
    Integer(i32),
    /// Bytes to bind.
    Binary(Vec<u8>),
}

impl Statement {
    /// A statement whose text is one of few, so that it is worth to be kept prepared.
    pub fn cached(pieces: Vec<Piece>) -> Self {
        Self {
            pieces,
            cached: true,
            number: None,
            nonce: None,
        }
    }

    /// A statement whose text is new nearly each time.
    pub fn uncached(pieces: Vec<Piece>) -> Self {
        Self {
            pieces,
            cached: false,
            number: None,
            nonce: None,
        }
    }

    #[cfg(any(feature = "postgres", feature = "mysql"))]
    pub(crate) fn numbered(mut self, number: u8) -> Self {
        self.number = Some(number);
        self
    }

    /// The text, with `?` for each bind: for tests and messages.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{Piece, Statement};
    ///
    /// let statement = Statement::cached(vec!["SELECT ".into(), Piece::BigInt(1)]);
    /// assert_eq!(statement.text(), "SELECT ?");
    /// ```
    pub fn text(&self) -> String {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Sql(sql) => sql.as_ref(),
                _ => "?",
            })
            .collect()
    }
}

#[cfg(feature = "postgres")]
impl Statement {
    /// The text with the numbers in it, for where there are no binds. There must be no other binds.
    pub(crate) fn inlined(&self) -> String {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Sql(sql) => sql.to_string(),
                Piece::BigInt(number) => format!("'{number}'::bigint"),
                Piece::Integer(number) => format!("'{number}'::int"),
                Piece::Binary(_) => unreachable!("BUG: names are not put into text"),
            })
            .collect()
    }
}

impl From<&'static str> for Piece {
    fn from(sql: &'static str) -> Self {
        Piece::Sql(Cow::Borrowed(sql))
    }
}

impl From<String> for Piece {
    fn from(sql: String) -> Self {
        Piece::Sql(Cow::Owned(sql))
    }
}

#[cfg(all(test, feature = "postgres", feature = "mysql"))]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::{Dialect, Machine, Mode, Mysql, Postgres, Step, Wait};

    fn first(mut machine: impl Machine) -> Statement {
        match machine.start() {
            Step::Query(statement) => statement,
            step => panic!("{step:?}"),
        }
    }

    fn of<D: Dialect>(keys: &[D::Key]) -> Vec<Statement> {
        let mut all = Vec::new();
        for key in keys {
            for mode in [Mode::Exclusive, Mode::Shared] {
                let wait = Wait::default();
                all.push(first(D::acquire(key, mode, wait, None)));
                all.push(first(D::acquire_abandonable(key, mode, wait, None)));
                all.push(first(D::release(key, mode, None)));
                all.push(first(D::release_abandonable(key, mode, None)));
                all.push(D::is_held(key, mode));
                all.extend(D::holders(key));
            }
        }
        all
    }

    /// A prepared statement is found by its number alone.
    #[test]
    fn a_number_stands_for_one_text_that_is_kept() {
        let keys = [42.into(), (1, -2).into()].map(|key| Postgres::key(&key).unwrap());
        let names = [Mysql::key(&"report".into()).unwrap()];
        let mut texts: BTreeMap<u8, BTreeSet<String>> = BTreeMap::new();
        for statement in [of::<Postgres>(&keys), of::<Mysql>(&names)].concat() {
            if let Some(number) = statement.number {
                assert!(statement.cached);
                texts.entry(number).or_default().insert(statement.text());
            }
        }
        assert!(texts.keys().copied().eq(0..=14));
        let all: BTreeSet<_> = texts.values().flatten().collect();
        assert_eq!(all.len(), texts.len(), "{texts:#?}");
        assert!(texts.values().all(|texts| texts.len() == 1), "{texts:#?}");
    }
}
