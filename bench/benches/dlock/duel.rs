//! Two ways to do the same, measured in turn: both see the same machine, so that its noise cancels out in their ratio.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{Criterion, SamplingMode, Throughput};
use hdrhistogram::Histogram;
use serde::Deserialize;

/// What criterion measures here: how many times as long as the other one takes.
struct Ratio;

impl Measurement for Ratio {
    type Intermediate = ();
    type Value = f64;

    fn start(&self) {}

    fn end(&self, (): ()) -> f64 {
        unreachable!("BUG: duels measure by iter_custom")
    }

    fn add(&self, one: &f64, other: &f64) -> f64 {
        one + other
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for Ratio {
    fn scale_values(&self, _typical: f64, _values: &mut [f64]) -> &'static str {
        "times"
    }

    fn scale_throughputs(
        &self,
        _typical: f64,
        _throughput: &Throughput,
        _values: &mut [f64],
    ) -> &'static str {
        "times"
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "times"
    }
}

/// Times in nanoseconds, exact to a thousandth.
pub(crate) fn times() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("BUG: the bounds are good")
}

/// Adds a time.
pub(crate) fn record(times: &mut Histogram<u64>, time: Duration) {
    times.saturating_record(time.as_nanos().try_into().unwrap_or(u64::MAX));
}

/// Where most of the times are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) p5: Duration,
    pub(crate) median: Duration,
    pub(crate) p95: Duration,
    pub(crate) p99: Duration,
    pub(crate) count: u64,
}

impl Spread {
    pub(crate) fn of(times: &Histogram<u64>) -> Self {
        let at = |quantile| Duration::from_nanos(times.value_at_quantile(quantile));
        Self {
            p5: at(0.05),
            median: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            count: times.len(),
        }
    }
}

/// A median with its 95 % confidence interval.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Estimate {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

/// What came of a duel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) ours: Spread,
    pub(crate) theirs: Spread,
    pub(crate) ratio: Estimate,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) samples: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measure: Duration,
}

/// What takes one turn and says how long that took.
pub(crate) type Turn<'a> = &'a mut dyn FnMut() -> Duration;

/// criterion, for ratios and for times.
pub(crate) struct Duels {
    folder: PathBuf,
    ratios: Criterion<Ratio>,
    times: Criterion,
}

impl Duels {
    pub(crate) fn new(folder: PathBuf) -> Self {
        let criterion = || {
            Criterion::default()
                .without_plots()
                .output_directory(&folder)
        };
        Self {
            ratios: criterion().with_measurement(Ratio),
            times: criterion(),
            folder,
        }
    }

    /// Lets `ours` and `theirs` take turns. A sample is the ratio of their medians in some such turns; the outcome's is
    /// the median of the samples.
    pub(crate) fn fight(
        &mut self,
        name: &str,
        pace: Pace,
        ours: Turn<'_>,
        theirs: Turn<'_>,
    ) -> Outcome {
        let mut all = [times(), times()];
        let mut of_sample = [times(), times()];
        let mut ours_first = true;
        let mut group = self.ratios.benchmark_group("ratio");
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(pace.samples)
            .warm_up_time(pace.warm_up)
            .measurement_time(pace.measure)
            .nresamples(10_000);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|turns| {
                for _ in 0..turns {
                    let mut take = |side: usize| {
                        let time = if side == 0 { ours() } else { theirs() };
                        record(&mut of_sample[side], time);
                    };
                    // Neither always comes right after the other.
                    let first = usize::from(!ours_first);
                    take(first);
                    take(1 - first);
                    ours_first = !ours_first;
                }
                let [ours, theirs] = [0, 1].map(|side: usize| {
                    all[side]
                        .add(&of_sample[side])
                        .expect("BUG: their bounds are the same");
                    let median = of_sample[side].value_at_quantile(0.5);
                    of_sample[side].reset();
                    median as f64
                });
                turns as f64 * ours / theirs
            });
        });
        group.finish();
        let [ours, theirs] = all;
        Outcome {
            ours: Spread::of(&ours),
            theirs: Spread::of(&theirs),
            ratio: self.estimate("ratio", name),
        }
    }

    /// Nanoseconds that `work` takes.
    pub(crate) fn time<T>(
        &mut self,
        name: &str,
        pace: Pace,
        mut work: impl FnMut() -> T,
    ) -> Estimate {
        let mut group = self.times.benchmark_group("time");
        group
            .sample_size(pace.samples)
            .warm_up_time(pace.warm_up)
            .measurement_time(pace.measure);
        group.bench_function(name, |bencher| bencher.iter(&mut work));
        group.finish();
        self.estimate("time", name)
    }

    /// What criterion has found out, from where it writes it down.
    fn estimate(&self, group: &str, name: &str) -> Estimate {
        #[derive(Deserialize)]
        struct Estimates {
            median: Median,
        }
        #[derive(Deserialize)]
        struct Median {
            point_estimate: f64,
            confidence_interval: Interval,
        }
        #[derive(Deserialize)]
        struct Interval {
            lower_bound: f64,
            upper_bound: f64,
        }
        let path = self
            .folder
            .join(group)
            .join(name)
            .join("new/estimates.json");
        let text = fs::read_to_string(&path).expect("criterion writes its estimates");
        let Estimates { median } = serde_json::from_str(&text).expect("criterion's estimates");
        Estimate {
            low: median.confidence_interval.lower_bound,
            median: median.point_estimate,
            high: median.confidence_interval.upper_bound,
        }
    }
}
