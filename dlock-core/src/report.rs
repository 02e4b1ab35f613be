use std::fmt;

/// What a check of the locks on a connection has found.
///
/// # Examples
///
/// ```
/// fn start(report: &dlock_core::Report) -> Result<(), String> {
///     if !report.excludes() {
///         return Err(report.to_string());
///     }
///     println!("{report}"); // one line, if all is well
///     Ok(())
/// }
/// ```
///
/// `{report}` leaves the [notes](Severity::Note) out, `{report:#}` shows them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The server and its version, as in `PostgreSQL 17.2`.
    pub server: String,
    /// The kinds of locks that dlock has on this server.
    pub locks: &'static str,
    /// What the check has found, the worst first.
    pub findings: Vec<Finding>,
}

/// One thing that a check has found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which setting or part of the way to the server it is about, in one or two words. It does not change, so you can
    /// compare it.
    pub topic: &'static str,
    /// What it is, and what to do.
    pub text: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// Two sessions can hold a lock at the same time.
    Danger,
    /// A lock can be lost, or stay held when nobody works any more.
    Warning,
    /// Good to know: what this server or user does not show.
    Note,
}

impl Report {
    pub(crate) fn new(server: String, locks: &'static str, mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.severity);
        Self {
            server,
            locks,
            findings,
        }
    }

    /// Whether the locks exclude, as far as one connection can tell: there is no [`Severity::Danger`].
    ///
    /// # Examples
    ///
    /// See [`Report`].
    pub fn excludes(&self) -> bool {
        self.of(Severity::Danger).next().is_none()
    }

    /// Whether there is nothing to do: there is neither a [`Severity::Danger`] nor a [`Severity::Warning`].
    ///
    /// # Examples
    ///
    /// ```
    /// fn print_if_not_well(report: &dlock_core::Report) {
    ///     if !report.is_well() {
    ///         eprintln!("{report}");
    ///     }
    /// }
    /// ```
    pub fn is_well(&self) -> bool {
        self.excludes() && self.of(Severity::Warning).next().is_none()
    }

    fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        let findings = self.findings.iter();
        findings.filter(move |finding| finding.severity == severity)
    }
}

impl Finding {
    pub(crate) fn danger(topic: &'static str, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Danger,
            topic,
            text: text.into(),
        }
    }

    pub(crate) fn warning(topic: &'static str, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::danger(topic, text)
        }
    }

    pub(crate) fn note(topic: &'static str, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            ..Self::danger(topic, text)
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.excludes() {
            true => write!(f, "{}: locks exclude ({})", self.server, self.locks)?,
            false => write!(f, "{}: LOCKS DO NOT EXCLUDE HERE", self.server)?,
        }
        let all = f.alternate();
        let shown = |finding: &&Finding| all || finding.severity < Severity::Note;
        for finding in self.findings.iter().filter(shown) {
            write!(f, "\n{finding}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Danger => "DANGER",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}: {}", self.topic, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(findings: Vec<Finding>) -> Report {
        Report::new("PostgreSQL 17.2".into(), "session locks", findings)
    }

    #[test]
    fn one_line_where_all_is_well_and_notes_only_if_asked_for() {
        let well = report(vec![Finding::note("role", "sees little")]);
        assert!(well.is_well());
        let line = "PostgreSQL 17.2: locks exclude (session locks)";
        assert_eq!(well.to_string(), line);
        assert_eq!(
            format!("{well:#}"),
            format!("{line}\nnote: role: sees little")
        );
    }

    #[test]
    fn the_worst_comes_first_and_is_loud() {
        let bad = report(vec![
            Finding::warning("keepalive", "off"),
            Finding::danger("standby", "its own locks"),
        ]);
        assert!(!bad.excludes() && !bad.is_well());
        assert_eq!(
            bad.to_string(),
            "PostgreSQL 17.2: LOCKS DO NOT EXCLUDE HERE\n\
             DANGER: standby: its own locks\n\
             warning: keepalive: off"
        );
        let lossy = report(vec![Finding::warning("keepalive", "off")]);
        assert!(lossy.excludes() && !lossy.is_well());
    }
}
