use std::time::Duration;

use super::config::Config;
use super::line::Asking;
use super::slab::Id;
use super::state::Manager;

impl Manager {
    /// When [`tick`](Self::tick) is due, unless something happens before. `None`: not until something happens.
    pub fn next_tick(&self) -> Option<Duration> {
        let config = &self.config;
        let conns = self.conns.iter().flat_map(|(_, conn)| {
            let linger = self.unwanted_at(conn.state);
            [
                conn.given_up_at(config),
                conn.asked_at(config),
                conn.unused_at(config),
                linger,
            ]
        });
        let others = [
            self.limits.first().map(|(at, _)| *at),
            self.polls.first().map(|(at, _)| *at),
            self.wants_to_open.then_some(self.open_after),
        ];
        conns.chain(others).flatten().min()
    }

    /// Everything that is due.
    pub(super) fn expire(&mut self, now: Duration) {
        self.expire_leases(now);
        while let Some(&(at, id)) = self.limits.first().filter(|(at, _)| *at <= now) {
            self.limits.remove(&(at, id));
            self.limit_passed(at, id, now);
        }
        while let Some(&(at, line)) = self.polls.first().filter(|(at, _)| *at <= now) {
            self.polls.remove(&(at, line));
            self.unpark(line);
        }
        for id in self.conns.ids() {
            let Some(conn) = self.conns.get(id) else {
                continue;
            };
            let unused = conn.unused_at(&self.config);
            let linger = self.unwanted_at(conn.state);
            if unused.into_iter().chain(linger).any(|at| at <= now) {
                self.shut(id, now);
            }
        }
    }

    /// A limit has passed. Where the server waits as long, its answer comes soon and names the holders.
    fn limit_passed(&mut self, at: Duration, id: Id, now: Duration) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let line = request.line;
        if request.hold.is_some() {
            return;
        }
        let asks_as_long = self.lines.get(line).is_some_and(
            |line| matches!(line.asking, Asking::Now { until, .. } if until == Some(at)),
        );
        if asks_as_long && request.until == Some(at) && !request.grace {
            request.grace = true;
            self.limits.insert((at + Config::GRACE, id));
            return;
        }
        self.taken(id, Vec::new(), now);
        self.serve(line, now);
    }
}
