//! What the controller breaks, and how often.

use crate::proof::random::Random;

/// How often each thing is broken in a round.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plan {
    /// Processes ended by SIGKILL.
    pub kill: u32,
    /// Processes stopped by SIGSTOP, for up to 3.5 seconds.
    pub stop: u32,
    /// Sessions ended by the server.
    pub end: u32,
    /// Statements cancelled by the server.
    pub cancel: u32,
    /// Connections of a process cut.
    pub cut: u32,
    /// Connections of a process half closed: the server sees the end of the client, the client sees nothing at first.
    pub half: u32,
    /// Answers withheld, and then the connections cut.
    pub answer: u32,
    /// Networks of a process silent for up to 3.5 seconds, then back or cut.
    pub silence: u32,
    /// Networks of a process slow.
    pub delay: u32,
    /// Servers killed and started again.
    pub restart: u32,
    /// Tables of locks full for a moment, for all sessions: PostgreSQL only. On SQLite, the disk.
    pub full: u32,
}

/// One kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Kill,
    Stop,
    End,
    Cancel,
    Cut,
    Half,
    Answer,
    Silence,
    Delay,
    Restart,
    Full,
}

impl Plan {
    /// A fault at random among those that are left, each as likely as it is frequent.
    pub(crate) fn next(&mut self, random: &mut Random) -> Option<Kind> {
        let mut counts = [
            (Kind::Kill, &mut self.kill),
            (Kind::Stop, &mut self.stop),
            (Kind::End, &mut self.end),
            (Kind::Cancel, &mut self.cancel),
            (Kind::Cut, &mut self.cut),
            (Kind::Half, &mut self.half),
            (Kind::Answer, &mut self.answer),
            (Kind::Silence, &mut self.silence),
            (Kind::Delay, &mut self.delay),
            (Kind::Restart, &mut self.restart),
            (Kind::Full, &mut self.full),
        ];
        let left = counts.iter().map(|(_, count)| u64::from(**count)).sum();
        if left == 0 {
            return None;
        }
        let mut at = random.below(left);
        for (kind, count) in &mut counts {
            if at < u64::from(**count) {
                **count -= 1;
                return Some(*kind);
            }
            at -= u64::from(**count);
        }
        unreachable!("BUG: below the sum")
    }

    /// Those that SQLite has: it is no server, and there is no network. What is full is its disk.
    pub fn without_server(self) -> Self {
        let Self {
            kill, stop, full, ..
        } = self;
        Self {
            kill,
            stop,
            full,
            ..Self::default()
        }
    }
}
