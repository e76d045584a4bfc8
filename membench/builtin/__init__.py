"""The models, techniques, workloads, quality metrics and suites that come with membench, as plug-ins."""
