use super::Binds;

/// A condition for the WHERE of a statement of the caller. Its text is one for each server, so that it does not fill
/// the server's and the driver's lists of statements. It owns its values, so it outlives the guard that made it.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// The text between the binds: one piece more than there are binds.
    pub sql: &'static [&'static str],
    /// What is bound.
    pub binds: Binds,
}

impl Condition {
    pub(crate) fn new(sql: &'static [&'static str], binds: impl Into<Binds>) -> Self {
        let binds = binds.into();
        debug_assert_eq!(sql.len(), binds.iter().count() + 1);
        Self { sql, binds }
    }

    /// The text, with `?` for each bind: for tests and messages.
    pub fn text(&self) -> String {
        self.sql.join("?")
    }
}
